"""Comparison pictures show every cell unchanged, with readable names."""

import numpy as np
import pytest
from PIL import Image

from tomesd.pictures.grid import grid

COLORS = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]


def solid(color: str, size=(48, 40)) -> Image.Image:
    return Image.new("RGB", size, color)


def ink(page: Image.Image) -> int:
    return int((np.asarray(page.convert("L")) < 128).sum())


@pytest.fixture
def cells() -> list[list[Image.Image]]:
    return [[solid(color) for color in row] for row in COLORS]


def test_every_cell_is_there_at_full_size_in_its_row_and_column(cells):
    page = np.asarray(
        grid(cells, ["a", "b"], ["1", "2", "3"], [["x", "y", "z"]] * 2, "title", "caption")
    )
    places = {}
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            ys, xs = (page == np.asarray(cell)[0, 0]).all(-1).nonzero()
            assert len(ys) == 48 * 40
            assert (np.ptp(xs), np.ptp(ys)) == (47, 39)
            places[i, j] = (ys[0], xs[0])
    assert all(len({places[i, j][0] for j in range(3)}) == 1 for i in range(2))
    assert all(len({places[i, j][1] for i in range(2)}) == 1 for j in range(3))
    assert places[0, 0] < places[1, 0]
    assert places[0, 0][1] < places[0, 1][1] < places[0, 2][1]


@pytest.mark.parametrize("what", ["labels", "title", "caption"])
def test_each_text_is_drawn(what):
    cells = [[solid("white")]]
    texts = {"labels": [["1.23 s"]], "title": "a red heart", "caption": "25 steps"}
    bare = ink(grid(cells, ["ToMe"], ["0.5"]))
    assert ink(grid(cells, ["ToMe"], ["0.5"], **{what: texts[what]})) > bare > 0


def test_a_long_title_is_broken_into_lines_that_fit(cells):
    names = {"rows": ["a", "b"], "columns": ["1", "2", "3"]}
    short, long = (grid(cells, **names, title="word " * n) for n in (1, 40))
    assert long.width == short.width
    assert long.height > short.height
    # Nothing is cut off: the margins stay white.
    margin = np.asarray(long)[:, -4:]
    assert (margin == 255).all()


def test_what_does_not_fit_together_is_refused(cells):
    with pytest.raises(ValueError, match=r"cells must be 2 rows of 2.*got rows of \[3, 3\]"):
        grid(cells, ["a", "b"], ["1", "2"])
    with pytest.raises(ValueError, match=r"labels must be 2 rows of 3.*got rows of \[3\]"):
        grid(cells, ["a", "b"], ["1", "2", "3"], [["x"] * 3])
    with pytest.raises(ValueError, match="rows and columns must not be empty"):
        grid([], [], ["1"])
    cells[1][2] = solid("red", (8, 8))
    with pytest.raises(ValueError, match=r"one size, got \[\(8, 8\), \(48, 40\)\]"):
        grid(cells, ["a", "b"], ["1", "2", "3"])
