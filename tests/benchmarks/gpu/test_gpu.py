"""scripts/gpu.py: each part runs without a GPU too, stops in time, and goes on where it stopped."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import command
from benchmarks.gpu.command import find_peers, main
from benchmarks.gpu.context import Case, Context, Part
from benchmarks.results import gpu as pages
from tests.benchmarks.support import ROOT, refused, save_peer
from tests.support.slow import slow

QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Two parts that only note that they were called."""
    called: list[str] = []

    def case(name: str, seconds: float = 0, result=None) -> Case:
        def run():
            called.append(name)
            if isinstance(result, Exception):
                raise result
            return {"value": name}

        return Case(name, run, seconds)

    parts = {
        "first": [case("a"), case("broken", result=RuntimeError("out of shared memory\nmore"))],
        "second": [case("long", seconds=1000), case("b")],
    }
    monkeypatch.setattr(
        command,
        "PARTS",
        {name: Part(name, lambda context, own=own: own) for name, own in parts.items()},
    )
    return called


def test_what_is_done_is_not_done_again_and_what_fails_does_not_stop_the_rest(
    calls, tmp_path, capsys
):
    output = tmp_path / "results.json"
    main([*QUICK, "--output", str(output)])
    assert calls == ["a", "broken", "b"]
    assert "1 cases are left for lack of time" in capsys.readouterr().out
    parts = json.loads(output.read_text())["parts"]
    assert parts["first"]["broken"] == {"error": "RuntimeError: out of shared memory"}
    assert list(parts["second"]) == ["b"]
    main([*QUICK, "--output", str(output), "--minutes", "20"])
    assert calls == ["a", "broken", "b", "long"]


def test_parts_can_be_named_alone(calls, tmp_path):
    main([*QUICK, "--output", str(tmp_path / "a.json"), "--part", "second", "--minutes", "20"])
    assert calls == ["long", "b"]


def test_no_case_starts_after_the_time_is_up(calls, tmp_path):
    main([*QUICK, "--output", str(tmp_path / "a.json"), "--minutes", "0"])
    assert calls == []


def test_results_of_other_versions_are_not_gone_on_with(calls, tmp_path, capsys):
    output = tmp_path / "a.json"
    output.write_text(json.dumps({"suite": "gpu", "environment": {"device": "another"}}))
    assert "must be of this device" in refused(main, [*QUICK, "--output", str(output)], capsys)


def test_peers_are_found_in_a_folder_or_below_it(tmp_path):
    for folder, package in (("a", "tomesd"), ("ToMe", "tome")):
        (tmp_path / folder / package).mkdir(parents=True)
        (tmp_path / folder / package / "__init__.py").touch()
    both = {"tomesd": tmp_path / "a", "tome": tmp_path / "ToMe"}
    assert find_peers([tmp_path]) == find_peers([tmp_path / "a", tmp_path / "ToMe"]) == both
    with pytest.raises(FileNotFoundError, match="peer-path must be a folder with the package"):
        find_peers([tmp_path / "a" / "tomesd"])


# facebookresearch/ToMe's entry point.
TOME = "class patch:\n    timm = staticmethod(lambda model: None)\n"


@slow
def test_all_parts_run_on_the_cpu_also_after_being_killed_in_the_middle(tmp_path):
    output = tmp_path / "quick.json"
    peers = save_peer(tmp_path / "peers")
    (peers / "ToMe" / "tome").mkdir(parents=True)
    (peers / "ToMe" / "tome" / "__init__.py").write_text(TOME)
    quick = [sys.executable, str(ROOT / "scripts" / "gpu.py"), *QUICK, "--minutes", "30"]
    quick += ["--output", str(output), "--peer-path", str(peers)]
    with subprocess.Popen(quick, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not output.exists() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    before = json.loads(output.read_text())["parts"]
    done = subprocess.run(quick, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    context = Context(torch.device("cpu"), True, {})
    for name, part in command.PARTS.items():
        rows = record["parts"][name]
        assert set(rows) == {case.name for case in part.cases(context)}
        for case, row in rows.items():
            assert "error" not in row, (name, case, row)
            if case in before.get(name, {}):
                assert row == before[name][case]
    record["environment"]["type"] = "cuda"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "device.json").write_text(json.dumps(record))
    page = pages.page(tmp_path)
    for heading, _ in pages._PARTS.values():
        assert f"### {heading}" in page
    for table in page.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1
    assert "| join, fp16 |" in pages.kernels(record)


def test_without_a_measured_gpu_the_page_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    assert pages.page(tmp_path) == "No GPU has been measured yet."
