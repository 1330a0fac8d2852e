"""scripts/benchmark.py times every variant in every round, and keeps what is finished."""

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.common.memory import Peak
from benchmarks.peer.process import Peer, PeerError, install_peer
from benchmarks.speed.command import main
from benchmarks.speed.forwards import child_peak
from benchmarks.speed.variants import forward
from tests.benchmarks.support import refused, run_benchmark, save_peer, save_unet
from tests.support.slow import slow


@pytest.fixture
def model_folder(tmp_path) -> Path:
    return save_unet(tmp_path / "model")


@pytest.fixture
def peer_cache(tmp_path) -> Path:
    return save_peer(tmp_path / "peers", "9.9")


@pytest.fixture
def benchmark(tmp_path):
    """Runs the command and returns what it wrote."""
    return partial(run_benchmark, tmp_path)


def test_every_variant_is_timed_in_every_round_and_all_settings_are_kept(
    benchmark, model_folder, capsys
):
    record = benchmark(
        *("--model", model_folder, "--size", 64, 128, "--ratio", 0.5, 0.25, "--rounds", 2),
        *("--no-merge-queries", "--method", "tome", "prune", "--no-memory"),
    )
    table = capsys.readouterr().out
    names = ["unpatched"]
    for ratio in ("0.5", "0.25"):
        names += [f"tome {ratio}", f"prune {ratio}", f"ideal {ratio}"]
    assert [(row["size"], row["variant"]) for row in record["forward"]] == [
        (size, name) for size in (64, 128) for name in names
    ]
    for row in record["forward"]:
        assert len(row["seconds"]) == 2
        assert row["median_seconds"]["median"] == pytest.approx(sum(row["seconds"]) / 2)
        assert row["variant"] in table
        assert row["kind"] == "unpatched" or row["patch"]["merge_queries"] is False
    assert record["forward"][0]["speedup"]["median"] == 1
    assert record["settings"]["ratio"] == [0.5, 0.25]
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["environment"]["torch_version"] == version("torch")


@slow
def test_memory_on_the_cpu_is_that_of_one_forward_in_a_process_of_its_own(model_folder):
    line = ["--model", str(model_folder), "--size", "512", "--device", "cpu"]
    setup = main.prepare(main.parser().parse_args(line)).setup
    memory = child_peak(setup, setup.variants[1], 512)
    # More than the tokens of one block that are there at once: input, output and the residual.
    assert memory["peak"] - memory["before"] > 3 * (2 * 64 * 64 * 8 * 4)


def test_memory_alone_is_measured_without_times(benchmark, model_folder, monkeypatch, capsys):
    peaks = {
        (size, name): Peak(before=size, peak=size + more)
        for size in (64, 128)
        for name, more in (("unpatched", 2), ("tome 0.5", 1))
    }
    monkeypatch.setattr(
        "benchmarks.speed.forwards.in_child",
        lambda function, setup, variant, size: peaks[size, variant.name],
    )
    record = benchmark("--model", model_folder, "--size", 64, 128, "--memory")
    found = {(row["size"], row["variant"]): Peak(**row["memory"]) for row in record["memory"]}
    assert list(found.items()) == list(peaks.items())
    assert not any("seconds" in row for row in record["memory"])
    assert capsys.readouterr().out.count(" GiB before)") == 4


@pytest.mark.parametrize("only", [(), ("--memory",)])
def test_a_row_for_which_memory_runs_out_says_so_and_the_others_are_measured(
    benchmark, model_folder, monkeypatch, only
):
    def killed_where_patched(function, setup, variant, size):
        if variant.kind == "patched":
            raise MemoryError("forward_peak was killed in its process (exit code -9)")
        return Peak(before=1, peak=2)

    monkeypatch.setattr("benchmarks.speed.forwards.in_child", killed_where_patched)
    record = benchmark("--model", model_folder, "--size", 64, "--rounds", 1, *only)
    unpatched, patched, *_ = record["memory" if only else "forward"]
    assert unpatched["memory"]["peak"] == 2
    assert ("seconds" in unpatched) == (not only)
    assert patched["error"] == "forward_peak was killed in its process (exit code -9)"
    assert "seconds" not in patched


def fails_at_128_px(monkeypatch, fail) -> None:
    def made(model, inputs, compiled):
        return forward(model, inputs, compiled) if inputs[0][0].shape[-1] == 8 else fail

    monkeypatch.setattr("benchmarks.speed.forwards.forward", made)


def test_a_forward_that_runs_out_of_memory_affects_its_own_row_only(
    benchmark, model_folder, monkeypatch
):
    fails_at_128_px(monkeypatch, lambda: torch.empty(2**50))
    rows = benchmark(
        *("--model", model_folder, "--size", 128, 64, "--rounds", 1, "--no-memory"),
    )["forward"]
    assert all("can't allocate memory" in row["error"] for row in rows[:3])
    assert all(len(row["seconds"]) == 1 for row in rows[3:])


def test_an_interrupted_run_keeps_the_finished_sizes(
    benchmark, model_folder, monkeypatch, tmp_path, capsys
):
    def interrupt():
        raise KeyboardInterrupt

    fails_at_128_px(monkeypatch, interrupt)
    with pytest.raises(SystemExit, match="130"):
        benchmark("--model", model_folder, "--size", 64, 128, "--rounds", 1, "--no-memory")
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["size"] for row in written["forward"]] == [64] * 3
    assert "   64 unpatched" in capsys.readouterr().out


def test_the_cost_is_split_into_steps_at_every_level(benchmark, model_folder, capsys):
    record = benchmark("--model", model_folder, "--size", 64, "--cost", "--rounds", 2)
    found = [(row["h"] * row["w"], row["channels"], row["blocks"]) for row in record["cost"]]
    assert found == [(64, 8, 3), (16, 16, 4)]
    for row in record["cost"]:
        total = [sum(times.values()) for times in row["seconds"]]
        assert row["all"]["median"] == pytest.approx(sum(total) / 2)
    assert "64 × 8" in capsys.readouterr().out


@slow
def test_the_peer_is_timed_in_its_own_process(benchmark, model_folder, peer_cache):
    common = ("--model", model_folder, "--size", 64, "--rounds", 2, "--no-memory")
    peer = ("--peer", "tomesd==9.9", "--peer-cache", peer_cache)
    record = benchmark(*common, *peer, "--ratio", 0.5, 0.25)
    works, fails = (row for row in record["forward"] if row["kind"] == "peer")
    assert len(works["seconds"]) == 2
    assert works["blocks_merged"] == 1
    # The peer's error is reported, and everything else is measured.
    assert fails["error"] == "AttributeError: this host is too new"
    assert sum("seconds" in row for row in record["forward"]) == 6


@slow
def test_the_cost_is_compared_with_the_peers(benchmark, model_folder, peer_cache):
    common = ("--model", model_folder, "--size", 64, "--rounds", 2, "--cost")
    record = benchmark(*common, "--peer", "tomesd==9.9", "--peer-cache", peer_cache)
    ours, theirs = record["cost"][:2]
    assert theirs["kind"] == "peer"
    ratios = [
        sum(a.values()) / sum(b.values())
        for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)
    ]
    assert ours["share_of_peer"]["median"] == pytest.approx(sum(ratios) / 2)


@slow
def test_a_peer_that_dies_is_reported(peer_cache):
    init = peer_cache / "tomesd-9.9" / "tomesd" / "__init__.py"
    init.write_text("import os\nos._exit(3)\n")
    with pytest.raises(PeerError, match="its process ended with exit code 3"):
        Peer(install_peer("tomesd==9.9", peer_cache))


@pytest.mark.parametrize("name", ["torch==2.15.0", "tomesd", "tomesd>=0.1", "tomesd==0.1 evil"])
def test_only_an_exact_version_of_tomesd_is_installed(name, tmp_path):
    with pytest.raises(ValueError, match=r"peer must be tomesd==<version>"):
        install_peer(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere"], "model must be sd15, sdxl, sd3, sd35, flux or a folder"),
        (["--size", "100"], "--size must be a multiple of 8, got 100"),
        (["--batch", "0"], "--batch: must be a whole number from 1 to 1024, got '0'"),
        (["--rounds", "0"], "--rounds: must be a whole number from 1 to 100000, got '0'"),
        (["--ratio", "0"], "--ratio must be above 0, got 0.0"),
        (["--ratio", "0.8"], "ratio must be at most 0.75, got 0.8"),
        (["--no-merge-attn"], "nothing would be merged"),
        (["--blocks", "2"], "blocks must not be given for 'sd15'"),
        (["--memory", "--no-memory"], "nothing would be measured"),
        (["--memory", "--cost"], "not allowed with argument"),
        (["--cost", "--compile"], "--compile must not be given with --cost"),
        (["--bias", "--compile"], "--compile must not be given with --bias"),
        (["--output", "/proc/nowhere/x.json"], "output must be in a writable folder"),
        (["--peer", "timm==1.0"], "peer must be tomesd==<version>, got 'timm==1.0'"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_named_before_any_work(capsys, args, message):
    assert message in refused(main, args, capsys)
