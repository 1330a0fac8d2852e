"""scripts/frontier.py measures its candidates, resumes interrupted runs, and mixes nothing."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.frontier.candidates import CANDIDATES, FAMILIES, chosen
from benchmarks.frontier.command import main
from benchmarks.frontier.results import mark_frontiers, pareto_front
from benchmarks.models import unets
from tests.benchmarks.support import UNET, refused, save_peer, save_unet
from tests.support.recorders import count_hooks
from tests.support.slow import slow
from tests.support.tiny_shapes import save_untrained, untrained_pipeline
from tomesd.diffusion.settings import PRESETS

# As in the peer's process: the number of threads touches the rounding.
pytestmark = pytest.mark.usefixtures("one_thread")

OURS = [each for each in CANDIDATES if each.settings and not each.is_peer and not each.cache]


@pytest.fixture(scope="module")
def pipe():
    pipe = untrained_pipeline()
    pipe.scheduler.set_timesteps(5)  # Of which the call at 500 is in the middle.
    return pipe


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A small run of every kind of candidate, in batches that do not come out even."""
    root = save_untrained(tmp_path_factory.mktemp("models"))
    save_unet(root / "large")
    save_peer(root / "peers")
    text = (
        f"--model {root / 'pipeline'} --speed-model {root / 'large'} --speed-size 64 --rounds 2 "
        f"--num-images 5 --batch 3 --num-reference 8 --size 32 --steps 2 --device cpu "
        f"--peer-cache {root / 'peers'}"
    )
    return text.split()


ONLY = (
    "attention 0.5",
    "grid 2x2",
    "attention 0.5, drawn",
    "tomesd==0.1.3 0.3",
    "tomesd==0.1.3 0.5",
)


@pytest.fixture(scope="module")
def run(options):
    """Runs the script; gives its results."""

    def run(output: Path, *more: str, only: tuple[str, ...] = ONLY) -> dict:
        main([*options, "--output", str(output), "--only", *only, *more])
        return json.loads((output / "results.json").read_text())

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """A folder with both halves. Not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {"/".join(p.parts[-2:]): p.read_bytes() for p in folder.glob("pictures/*/*/*.png")}


@torch.no_grad()
def predict(unet, size: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, size, size, generator=draw)
    text = torch.randn(2, 16, unet.config.cross_attention_dim, generator=draw)
    return unet(latents, torch.tensor(500), text).sample


@pytest.mark.parametrize("candidate", OURS, ids=lambda each: each.name)
def test_every_candidate_merges_and_is_removed_bit_for_bit(pipe, candidate):
    before = predict(pipe.unet)
    with candidate.patched(pipe):
        merged = predict(pipe.unet)
    assert merged.isfinite().all()
    assert not torch.allclose(merged, before, atol=1e-5)
    assert count_hooks(pipe.unet) == 0
    assert torch.equal(predict(pipe.unet), before)


def test_the_time_of_a_schedule_is_the_mean_of_its_steps(run, tmp_path):
    rows = run(tmp_path, "--speed-only", only=("blocks 0.5, late",))["rows"]
    seconds = {row["name"]: row["seconds"]["median"] for row in rows}
    assert set(seconds) == {"unpatched", "blocks 0.5", "blocks 0.5, late"}
    (*taken,) = json.loads((tmp_path / "speed.json").read_text())["rounds"]
    assert all(each.keys() == {"unpatched", "blocks 0.5"} for each in taken)
    wanted = [0.2 * each["unpatched"] + 0.8 * each["blocks 0.5"] for each in taken]
    assert seconds["blocks 0.5, late"] == pytest.approx(statistics.median(wanted))
    left = {row["name"]: row["attention_left"]["large"] for row in rows}
    assert left["blocks 0.5, late"] == pytest.approx(0.2 + 0.8 * left["blocks 0.5"])


def test_a_schedule_is_chosen_together_with_its_steady_candidate():
    for each in CANDIDATES:
        names = [there.name for there in chosen([each.name], with_peer=True)]
        assert {each.name, each.steady.name} <= set(names)


def test_candidates_have_unique_names_that_can_be_folders():
    names = [candidate.name for candidate in CANDIDATES]
    assert len({name.lower() for name in names}) == len(names)
    assert not [name for name in names if set(name) & set('/\\:*?"<>|') or name != name.strip()]
    assert {candidate.family for candidate in CANDIDATES} == set(FAMILIES)


def test_the_frontier_are_the_points_that_no_other_one_beats():
    draw = torch.Generator().manual_seed(0)
    points = [tuple(p) for p in torch.randint(0, 6, (40, 2), generator=draw).tolist()]
    best = pareto_front(points)
    assert [points[i] for i in best] == sorted(points[i] for i in best)
    for index, (x, y) in enumerate(points):
        beaten = [a for a in points if a[0] >= x and a[1] >= y and a != (x, y)]
        assert (index in best) == (not beaten)


def test_the_default_and_every_preset_are_candidates():
    shipped = [each.shipped_as for each in CANDIDATES if each.shipped_as]
    presets = sorted(set(PRESETS) - {"late"})
    assert sorted(shipped) == ["default", *(f"preset {name}" for name in presets)]


def test_settings_have_a_frontier_of_their_own():
    def row(speed: float, psnr: float, frechet: float, is_setting: bool) -> dict:
        figures = {"psnr": psnr, "frechet": frechet, "speedup": {"median": speed}}
        return figures | {"is_setting": is_setting, "settings": {}}

    rows = [row(1.2, 30, 5, True), row(1.3, 31, 6, False), row(1.1, 29, 7, True)]
    mark_frontiers(rows)
    assert [row["frontier"] for row in rows] == [["frechet"], ["psnr", "frechet"], []]
    assert [row["settings_frontier"] for row in rows] == [["psnr", "frechet"], [], []]


def test_the_results_have_every_figure_settings_versions_and_the_device(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [
        each.name for each in CANDIDATES if each.name in ("unpatched", *ONLY)
    ]
    for row in results["rows"][1:]:
        assert {"psnr", "frechet", "speedup", "seconds", "attention_left"} <= row.keys()
        assert row["settings"]["ratio"] > 0
    assert results["rows"][0]["speedup"]["median"] == 1
    assert results["quality"]["sampling"]["steps"] == 2
    assert results["quality"]["device_name"]
    assert results["speed"]["size"] == 64
    assert results["speed"]["cpu"]
    for half in ("quality", "speed"):
        versions = results[half].get("versions", results[half])
        assert versions["torch_version"] == torch.__version__.partition("+")[0]
    table = (finished / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ONLY)
    assert Image.open(finished / "frontier.png").width > 500


def test_the_attention_left_is_the_share_of_pairs_that_is_still_computed(finished):
    rows = json.loads((finished / "results.json").read_text())["rows"]
    left = {row["name"]: row["attention_left"]["large"] for row in rows}
    levels = unets.levels(UNET, 8)
    pairs = [level.blocks * (level.h * level.w) ** 2 for level in levels]
    assert left["unpatched"] == 1
    assert left["attention 0.5"] == pytest.approx((pairs[0] / 4 + sum(pairs[1:])) / sum(pairs))
    assert left["grid 2x2"] == pytest.approx(left["attention 0.5"])


def test_the_peers_pictures_come_from_the_same_prompts_and_seeds(finished):
    made = pictures(finished)
    # At 0.3 this one changes nothing: every pixel is that of the unpatched pipeline.
    for index in range(5):
        names = [f"{name}/{index:05}.png" for name in ("unpatched", "tomesd==0.1.3 0.3")]
        first, second = (next(finished.glob(f"pictures/*/{name}")) for name in names)
        assert Image.open(first).tobytes() == Image.open(second).tobytes()
        assert made[names[0]] != made[f"tomesd==0.1.3 0.5/{index:05}.png"]


@slow
def test_separate_halves_and_a_resumed_run_make_the_same_pictures(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "speed.json").unlink()
    (tmp_path / "frontier.png").unlink()
    lost = list(tmp_path.glob("pictures/*/*0.5*/00004.png"))
    assert len(lost) == 3
    for path in lost:
        path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("pictures/*/*/*.png")}
    results = run(tmp_path, "--quality-only")
    assert not (tmp_path / "frontier.png").exists()
    assert not any("speedup" in row for row in results["rows"])
    assert pictures(tmp_path) == pictures(finished)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    joined = run(tmp_path, "--speed-only")["rows"]
    for row, before in zip(joined, results["rows"], strict=True):
        assert {name: row[name] for name in before if "frontier" not in name} == {
            name: value for name, value in before.items() if "frontier" not in name
        }
        assert row["speedup"]["median"] > 0
    assert (tmp_path / "frontier.png").exists()


def test_earlier_rounds_are_kept_and_new_candidates_get_as_many(run, tmp_path):
    def rounds() -> list[dict]:
        return json.loads((tmp_path / "speed.json").read_text())["rounds"]

    run(tmp_path, "--speed-only", only=("attention 0.5",))
    first = rounds()
    assert [sorted(taken) for taken in first] == [["attention 0.5", "unpatched"]] * 2
    run(tmp_path, "--speed-only", only=("attention 0.5", "keys 0.5"))
    assert rounds()[:2] == first
    assert [sorted(taken) for taken in rounds()[2:]] == [["keys 0.5", "unpatched"]] * 2
    run(tmp_path, "--speed-only", "--rounds", "3", only=("attention 0.5", "keys 0.5"))
    assert len(rounds()) == 5


def test_results_of_other_candidates_are_kept_and_equal_those_of_one_run(run, finished, tmp_path):
    one, other = ("attention 0.5",), ("grid 2x2",)
    run(tmp_path, "--quality-only", only=one)
    run(tmp_path, "--quality-only", only=other)
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert list(quality["rows"]) == list(quality["merging"]) == ["unpatched", *one, *other]
    whole = json.loads((finished / "quality.json").read_text())
    assert all(whole["rows"][name] == row for name, row in quality["rows"].items())
    assert f"| {one[0]} |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("half", "changed", "said"),
    [
        ("speed", ["--speed-size", "32"], "size=64 in it, 32 now"),
        ("quality", ["--num-reference", "9"], "reference='shapes-8' in it, 'shapes-9' now"),
    ],
)
def test_results_of_other_settings_are_refused_and_kept(
    options, finished, tmp_path, capsys, half, changed, said
):
    for name in ("quality.json", "speed.json"):
        shutil.copy(finished / name, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    argv = [*options, "--output", str(tmp_path), "--only", *ONLY, *changed]
    message = refused(main, argv, capsys)
    assert f"output must be another folder, or {tmp_path / half}.json deleted" in message
    assert said in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "ToMe 2"], "only must be among: unpatched; attention 0.3;"),
        (["--no-peer", "--only", "tomesd==0.1.3 0.5"], "got 'tomesd==0.1.3 0.5'"),
        (["--num-images", "3"], "num-images must be 4 or more"),
        (["--num-reference", "3"], "num-reference must be from 4"),
        (["--model", "nowhere/at_all"], "model must be a pipeline's folder, got 'nowhere/at_all'"),
        (["--size", "30"], "size must be a multiple of 4, got 30"),
        (["--speed-model", "sd99"], "model must be sd15, sdxl or a folder"),
        (["--speed-size", "100"], "speed-size must be a multiple of 8, got 100"),
        (["--rounds", "0"], "--rounds: must be a whole number"),
        (["--device", "abacus"], "device must be one of"),
        (["--quality-only", "--speed-only"], "not allowed with argument"),
        (["--output", "{file}"], "output must be a folder, got the file"),
        (["--output", "/proc/x"], "output must be in a writable folder, got '/proc/x'"),
    ],
)
def test_bad_input_is_named_before_any_work(options, args, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = [arg.format(file=tmp_path / "file") for arg in args]
    assert message in refused(main, [*options, "--output", str(tmp_path / "out"), *args], capsys)
    assert not (tmp_path / "out").exists()
