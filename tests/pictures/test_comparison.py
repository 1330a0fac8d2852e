"""A comparison's cells are the very pictures that each method makes at each ratio."""

import numpy as np
import pytest

import tomesd
from tests.support.tiny_shapes import untrained_pipeline
from tomesd.pictures.comparison import compare, picture
from tomesd.pictures.sampling import Sampling, sample

HOW = Sampling(steps=2, guidance=3.0, width=32, height=32)
RATIOS = (0, 0.3, 0.6)


@pytest.fixture(scope="module")
def pipe():
    """The embedded pipeline's architecture with random weights."""
    pipe = untrained_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cells(pipe):
    return compare(pipe, "a red heart", 5, HOW, RATIOS)


def plain(pipe) -> np.ndarray:
    return np.asarray(next(sample(pipe, ["a red heart"], [5], HOW)))


def test_each_cell_is_what_its_method_makes_at_its_ratio(pipe, cells):
    assert list(cells) == ["tome", "prune"]
    for method, row in cells.items():
        for ratio, cell in zip(RATIOS, row, strict=True):
            with tomesd.patched(pipe, ratio, method=method):
                assert (np.asarray(cell.image) == plain(pipe)).all()
    different = {cell.image.tobytes() for row in cells.values() for cell in row}
    assert len(different) == 1 + 2 * (len(RATIOS) - 1)


def test_the_unpatched_picture_is_made_once_and_every_run_is_timed(cells):
    assert cells["tome"][0] is cells["prune"][0]
    assert all(cell.seconds > 0 for row in cells.values() for cell in row)


def test_comparing_leaves_no_patch_behind(pipe, cells):
    with pytest.raises(ValueError, match="without a patch"):
        tomesd.report(pipe)
    assert (plain(pipe) == np.asarray(cells["tome"][0].image)).all()


def test_a_preset_is_what_is_compared(pipe):
    with tomesd.patched(pipe, 0.5, preset="paper"):
        expected = plain(pipe)
    cells = compare(pipe, "a red heart", 5, HOW, (0, 0.5), preset="paper")
    assert (np.asarray(cells["tome"][1].image) == expected).all()


def test_the_picture_holds_all_cells(cells):
    page = np.asarray(picture(cells, RATIOS, "a red heart", "embedded"))
    shown = np.lib.stride_tricks.sliding_window_view(page, (32, 32, 3))
    for row in cells.values():
        for cell in row:
            assert (shown[:, :, 0] == np.asarray(cell.image)).all((-1, -2, -3)).any()


def test_ratios_that_do_not_start_with_0_are_refused(pipe):
    with pytest.raises(ValueError, match=r"ratios must start with 0, got \[0.1, 0.2\]"):
        compare(pipe, "a red heart", 5, HOW, (0.1, 0.2))
