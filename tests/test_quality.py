"""The measure of how much merging changes a picture."""

import numpy as np
import pytest
from PIL import Image

from tests.tiny_shapes import untrained_pipeline
from tomesd.evaluation.quality import CASES, held_out, pictures, psnr
from tomesd.evaluation.sampling import Sampling
from tomesd.shapes.world import HELD_OUT

PROMPTS = ["a red heart", "a blue star", "a green moon"]
HOW = Sampling(steps=2, guidance=3.0, width=64, height=64)


def test_an_interrupted_run_ends_with_the_same_files(tmp_path):
    pipe = untrained_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pictures(pipe, PROMPTS, HOW, tmp_path, {"ratio": 0.5}, batch=2)
    files = sorted(tmp_path.iterdir())
    whole = [file.read_bytes() for file in files]
    assert len(files) == len(PROMPTS)
    files[1].unlink()
    pictures(pipe, PROMPTS, HOW, tmp_path, {"ratio": 0.5}, batch=2)
    assert [file.read_bytes() for file in files] == whole


@pytest.mark.parametrize("case", CASES)
def test_every_case_changes_the_picture(tmp_path, case):
    pipe = untrained_pipeline()
    pipe.set_progress_bar_config(disable=True)
    (unpatched,) = pictures(pipe, PROMPTS[:1], HOW, tmp_path / "unpatched", {"ratio": 0.0})
    (merged,) = pictures(pipe, PROMPTS[:1], HOW, tmp_path / "merged", CASES[case](0.5))
    assert psnr(merged, unpatched) < 60


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
