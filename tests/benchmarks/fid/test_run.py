"""scripts/fid.py resumes interrupted runs, mixes no settings, and always makes the same table."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from benchmarks.common import memory
from benchmarks.common.memory import Peak
from benchmarks.fid.command import main
from benchmarks.fid.measurements import measure_speed
from benchmarks.fid.memory_limits import Largest, Prober, largest
from benchmarks.pictures.picture_set import PipelineSpec, parse_methods
from tests.benchmarks.support import ROOT
from tests.support.slow import slow
from tests.support.tiny_shapes import save_untrained

# As in the child processes: the number of threads touches the rounding.
pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = ROOT / "scripts" / "fid.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The embedded architectures with random weights."""
    return save_untrained(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def options(models) -> list[str]:
    """A small run of three rows of ten pictures, in batches that do not come out even."""
    text = (
        f"--model {models / 'pipeline'} --classifier {models / 'classifier'} --device cpu "
        "--prompts shapes --reference shapes --num-reference 12 --num-images 10 --batch 3 "
        "--size 32 --steps 2 --guidance 4 --methods prune:0.1 tome:0.5"
    )
    return text.split()


@pytest.fixture(scope="module")
def fid(options):
    """Run the script without times; gives the folder with everything."""

    def run(output: Path, *more: str) -> Path:
        main([*options, "--quality-only", *more, "--output", str(output)])
        return max(output.glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns).parent

    return run


@pytest.fixture(scope="module")
def finished(fid, tmp_path_factory) -> Path:
    """A run that was never interrupted. Not to be written to."""
    return fid(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of it, with the features of its reference, in tmp_path."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / finished.name


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/*.png"))}


def table(folder: Path) -> str:
    """All but the command, which names the folder."""
    lines = (folder / "table.md").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("`python"))


def start(command: list[str], output: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command, "--quality-only", "--output", str(output)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@slow
def test_killed_twice_it_still_gives_the_identical_table(fid, finished, options, tmp_path):
    chance = random.Random(0)
    # In the first row of ten pictures, and in a later one.
    for enough in (chance.randint(1, 7), chance.randint(11, 20)):
        process = start([str(SCRIPT), *options], tmp_path)
        while len(list(tmp_path.glob("*/*/*.png"))) < enough:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 11 <= len(list(tmp_path.glob("*/*/*.png"))) < 30
    again = fid(tmp_path)
    assert pictures(again) == pictures(finished)
    assert table(again) == table(finished)
    assert not list(tmp_path.rglob("*.partial"))


@slow
def test_two_processes_make_the_identical_pictures_and_table(finished, options, tmp_path):
    # On the CPU alone, accelerate's own launcher starts one process only.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*launch, str(SCRIPT), *options], tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    (folder,) = (path.parent for path in tmp_path.glob("*/results.json"))
    assert json.loads((folder / "results.json").read_text())["environment"]["processes"] == 2
    assert pictures(folder) == pictures(finished)
    assert table(folder) == table(finished)


def test_each_row_has_its_picture_of_the_same_prompt_and_seed(finished):
    names = [f"{index:05}.png" for index in range(10)]
    for row in ("unpatched", "prune 0.1", "tome 0.5"):
        assert sorted(path.name for path in (finished / row).iterdir()) == names
    metadata = [Image.open(finished / row / names[7]).text for row in ("unpatched", "tome 0.5")]
    for name in ("prompt", "seed", "steps", "guidance", "width", "batch"):
        assert metadata[0][name] == metadata[1][name]
    assert metadata[0]["seed"] == "7"
    assert metadata[0]["ratio"] == "0.0"
    assert json.loads(metadata[1]["merging"])["ratio"] == 0.5
    made = pictures(finished)
    assert len({made[f"{row}/00007.png"] for row in ("unpatched", "prune 0.1", "tome 0.5")}) == 3


def test_the_results_have_settings_versions_the_device_and_every_figure(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["settings"]["sampling"]["steps"] == 2
    assert results["settings"]["reference"] == "shapes-12"
    assert results["settings"]["images"] == 10
    assert results["environment"]["torch_version"] == torch.__version__.partition("+")[0]
    assert results["environment"]["device_name"]
    assert [row["name"] for row in results["rows"]] == ["unpatched", "prune 0.1", "tome 0.5"]
    for row in results["rows"][1:]:
        assert {"frechet", "kid", "precision", "recall", "psnr", "ssim", "perceptual"} <= row.keys()
    written = (finished / "table.md").read_text()
    assert "| ToMe | 50 |" in written
    assert "FID" not in written
    assert "KID" not in written
    for name in ("methods.png", "samples.png"):
        assert Image.open(finished / name).width > 3 * 32


def test_existing_pictures_are_kept_and_new_rows_are_added(fid, tmp_path):
    folder = fid(tmp_path, "--methods", "tome:0.5")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    assert fid(tmp_path, "--methods", "tome:0.5,0.25") == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("*/*.png"))) == 30


@slow
def test_changed_settings_start_a_new_folder(fid, tmp_path):
    changes = [
        (),
        ("--steps", "1"),
        ("--guidance", "5"),
        ("--scheduler", "euler"),
        ("--batch", "2"),
    ]
    few = ("--methods", "tome:0.5", "--num-images", "4")
    folders = [fid(tmp_path, *few, *changed) for changed in changes]
    assert len(set(folders)) == len(changes)


def test_a_broken_picture_is_reported_and_made_again(fid, finished, copied, tmp_path, capsys):
    cut, other = copied / "tome 0.5" / "00004.png", copied / "tome 0.5" / "00005.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    other.write_bytes((copied / "unpatched" / "00005.png").read_bytes())
    fid(tmp_path)
    errors = capsys.readouterr().err
    assert "00004.png is broken" in errors
    assert "00005.png is another picture: method, ratio, merging differ" in errors
    assert pictures(copied) == pictures(finished)


def test_a_full_disk_is_one_line_and_nothing_is_averaged(fid, finished, copied, tmp_path, capsys):
    # capsys: what is printed must not go to a file, which could not grow.
    (copied / "results.json").unlink()
    for index in range(3, 10):
        (copied / "prune 0.1" / f"{index:05}.png").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SystemExit, match=r"File too large.*\nFinished work is kept") as stop:
            fid(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop.value.code
    assert not (copied / "results.json").exists()
    assert len(list((copied / "prune 0.1").iterdir())) == 3
    assert table(fid(tmp_path)) == table(finished)


@slow
def test_times_and_memory_are_measured_once(options, tmp_path, monkeypatch):
    peaks = {}

    def in_child(function, spec, pictures, method):
        assert method.name not in peaks
        # One process shows that it works.
        peaks[method.name] = (
            Peak(0, 123) if method.settings else memory.in_child(function, spec, pictures, method)
        )
        return peaks[method.name]

    monkeypatch.setattr("benchmarks.fid.speed_and_memory.in_child", in_child)
    command = [*options, "--methods", "tome:0.5", "--num-images", "4", "--rounds", "1"]
    written = []
    for _ in range(2):
        main([*command, "--output", str(tmp_path)])
        (folder,) = (path.parent for path in tmp_path.glob("*/results.json"))
        written.append((folder / "table.md").read_text())
    assert written[0] == written[1]
    assert "| s/im ↓ | peak GB ↓ |" in written[0]
    measured = json.loads((folder / "results.json").read_text())["rows"]
    assert all(row["seconds"] > 0 for row in measured)
    assert {row["name"]: row["memory"] for row in measured} == {
        "unpatched": peaks["unpatched"].peak,
        "tome 0.5": 123,
    }
    assert peaks["unpatched"].peak > 1e8
    assert Image.open(folder / "plot.png").width > 500


def test_times_of_another_number_of_threads_are_not_reused(tmp_path, monkeypatch):
    pictures = Mock(methods=parse_methods([], None), folder=tmp_path)
    plan = Mock(pictures=pictures, rounds=1, device=torch.device("cpu"))
    threads = Mock()
    monkeypatch.setattr("torch.get_num_threads", threads)
    monkeypatch.setattr(
        "benchmarks.fid.speed_and_memory.measure",
        lambda *args: {"unpatched": {"seconds": [6 / threads()], "memory": 123}},
    )
    for count in (2, 2, 3):
        threads.return_value = count
        assert measure_speed(plan, pipe=None)["unpatched"]["seconds"] == 6 / count


@pytest.mark.parametrize("true", [0, 1, 2, 27, 64, 99, 100])
def test_bisection_finds_the_largest_that_fits_in_few_trials(true):
    tries = []

    def fits(number: int) -> str:
        tries.append(number)
        return "" if number <= true else f"{number} is too large"

    found = largest(fits, most=100)
    assert found.value == true
    assert max(tries) <= 100
    assert len(tries) == len(set(tries)) <= 14
    if true < 100:
        assert found == Largest(true, f"{true + 1} is too large")


class _Forgetful(Prober):
    """A process whose memory is used up after two tries."""

    processes = 0

    def _try(self, *asked):
        if self._pool is None:
            self.processes, self._trials, self._pool = self.processes + 1, 0, Mock()
        self._trials += 1
        return "too large" if asked[1] > 8 or self._trials > 2 else ""


def test_memory_kept_from_earlier_trials_does_not_lower_the_limit():
    prober = _Forgetful(PipelineSpec(None, "cpu", torch.float32, None))
    batch = largest(lambda n: prober.fits(None, n, 128, 4.0), 64)
    assert batch == Largest(8, "too large")
    assert prober.processes > 1


@slow
def test_a_picture_that_exceeds_the_memory_does_not_fit_and_the_next_one_may(models):
    model = PipelineSpec(str(models / "pipeline"), "cpu", torch.float32, None)
    # Python with torch alone takes half a gigabyte or more. The side is one of which not even the
    # first layer can be computed: smaller ones take minutes before memory is all used.
    with Prober(model, 1_500_000_000) as prober:
        tome = parse_methods(["tome:0.5"], None)[1].settings
        assert "can't allocate memory" in prober.fits(tome, 1, 16384, 4.0)
        assert prober.fits(tome, 1, 64, 4.0) == ""
