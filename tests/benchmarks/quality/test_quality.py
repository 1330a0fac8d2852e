"""scripts/quality.py measures each case, resumes an interrupted run, and mixes no settings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.common import files
from benchmarks.pictures.prompts import held_out
from benchmarks.quality import command
from benchmarks.quality.cases import CASES, Case, merge_rows
from benchmarks.quality.command import main
from tests.benchmarks.support import refused
from tests.support.tiny_shapes import untrained_pipeline
from tomesd.pictures.differences import psnr
from tomesd.shapes.world import HELD_OUT

NAMES = ("whole blocks", "in the second half")
FEW = ["--num-images", "3", "--batch", "2", "--steps", "2", "--cases", *NAMES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with one ratio of two cases. Later tests add to it."""
    folder = tmp_path_factory.mktemp("quality")
    main([*FEW, "--ratios", "0.5", "--output", str(folder)])
    return folder


def pictures(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.glob("*/*/*.png"))}


def results(folder: Path) -> dict:
    (file,) = folder.glob("*/results.json")
    return json.loads(file.read_text())


def test_a_resumed_run_ends_with_the_same_files_and_remakes_pictures_of_other_settings(finished):
    before, figures = pictures(finished), results(finished)
    assert len(before) == 3 * (1 + len(NAMES))
    late = [path for path in before if path.parent.name == "in the second half 0.5"]
    late[0].unlink()
    # What a run of other settings, or of an earlier meaning of the case, might have left.
    early = [path for path in before if path.parent.name == "whole blocks 0.5"]
    early[1].write_bytes(before[late[1]])
    main([*FEW, "--ratios", "0.5", "--output", str(finished)])
    assert pictures(finished) == before
    assert results(finished) == figures


def test_rows_of_other_ratios_are_added_to_existing_ones(finished, capsys):
    before = results(finished)["rows"]
    main([*FEW, "--ratios", "0.1", "--output", str(finished)])
    after = results(finished)["rows"]
    assert [(row["case"], row["ratio"]) for row in after] == [
        (name, ratio) for name in NAMES for ratio in (0.1, 0.5)
    ]
    assert [row for row in after if row["ratio"] == 0.5] == before
    # The table is of what was asked for.
    assert re.search(r"^\| whole blocks \| [^|]+ \|$", capsys.readouterr().out, re.MULTILINE)


def test_earlier_rows_of_a_changed_case_are_left_out(monkeypatch):
    def row(name: str) -> dict:
        return {"case": name, "ratio": 0.5, "merging": Case(name, at=0.5).merging}

    rows = [row(name) for name in NAMES]
    rows = json.loads(json.dumps(rows))
    assert merge_rows(rows, []) == rows
    monkeypatch.setitem(CASES, NAMES[1], CASES["in the first half of the steps"])
    assert merge_rows(rows, []) == rows[:1]
    monkeypatch.delitem(CASES, NAMES[0])
    assert merge_rows(rows, []) == []


def test_pictures_of_other_settings_or_another_classifier_get_another_folder(tmp_path):
    few = ["--num-images", "1", "--steps", "1", "--ratios", "--output", str(tmp_path)]
    for more in ([], ["--batch", "3"], ["--num-images", "2"]):
        main([*few, *more])
    assert len(list(tmp_path.glob("*/results.json"))) == 3
    with pytest.MonkeyPatch.context() as patch:
        digest = files.digest
        patch.setattr(command, "digest", lambda path: digest(path)[1:])
        main(few)
    assert len(list(tmp_path.glob("*/results.json"))) == 4


@pytest.fixture(scope="module")
def pipe():
    pipe = untrained_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("case", CASES)
def test_every_case_changes_the_picture(pipe, case):
    def picture(row) -> np.ndarray:
        with row.patched(pipe):
            draw = torch.Generator().manual_seed(0)
            size = {"width": 64, "height": 64, "output_type": "np"}
            return pipe("a red heart", generator=draw, num_inference_steps=2, **size).images

    assert not np.array_equal(picture(Case(case, at=0.5)), picture(Case(case, at=0.0)))


def test_cases_that_merge_differently_have_different_metadata():
    said = [json.dumps(Case(name, at=0.5).merging) for name in CASES]
    assert len(set(said)) == len(CASES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "0"], "must be a whole number from 1 to 10000, got '0'"),
        (["--ratios", "0.8"], "must be a number from 0 to 0.75, got '0.8'"),
        (["--cases", "none"], "invalid choice: 'none'"),
        (["--output", "/proc/x"], "output must be in a writable folder, got '/proc/x'"),
        (["--output", "{file}"], "output must be a folder, got the file"),
    ],
)
def test_bad_input_is_named_before_any_work(options, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = [option.format(file=tmp_path / "file") for option in options]
    assert message in refused(main, options, capsys)


def test_every_option_names_its_default():
    for action in main.parser()._actions:
        assert action.dest == "help" or "(" in (action.help or ""), action.dest


def test_psnr_is_that_of_its_definition():
    first = np.random.default_rng(0).integers(0, 200, (8, 8, 3), dtype=np.uint8)
    second = first + 5
    assert psnr(Image.fromarray(first), Image.fromarray(first)) == float("inf")
    assert psnr(Image.fromarray(second), Image.fromarray(first)) == pytest.approx(
        20 * np.log10(255 / 5)
    )


def test_too_many_held_out_scenes_are_refused():
    with pytest.raises(ValueError, match=rf"count must be from 1 to {len(HELD_OUT)}, got 0"):
        held_out(0)
