"""Pictures side by side, with labels."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_PAPER = "white"
_INK = (24, 24, 24)
_PALE = (96, 96, 96)


def grid(
    cells: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: Sequence[Sequence[str]] | None = None,
    title: str = "",
    caption: str = "",
) -> Image.Image:
    """One picture of many: names to the left of the rows and above the columns.

    >>> grid([[a, b], [c, d]], rows=["ToMe", "pruned"], columns=["ratio 0.1", "ratio 0.5"])

    cells: a list of pictures for each row, all of one size; they are not resized.
    labels: a short text below each cell, in the shape of `cells`.
    title, caption: above and below everything, broken into lines where they are too long.
    Text grows with the cells, so that a grid looks the same at 128 and at 512 px.
    Raises ValueError if names or labels are not as many as the cells, or sizes differ.
    """
    _check(cells, rows, columns, labels)
    width, height = cells[0][0].size
    size = max(14, width // 10)
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(12, size * 5 // 6))
    gap = max(4, size // 3)
    line = round(size * 1.4)
    left = 2 * gap + round(max(font.getlength(name) for name in rows))
    total_width = left + len(columns) * (width + gap) + gap
    above = _wrap(title, font, total_width - 4 * gap)
    below = _wrap(caption, small, total_width - 4 * gap)

    top = gap + line * (len(above) + 1) + gap * bool(above)
    row_height = height + (line if labels else 0) + gap
    bottom = top + len(rows) * row_height
    page = Image.new("RGB", (total_width, bottom + line * len(below) + gap * bool(below)), _PAPER)
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(above):
        draw.text((2 * gap, gap + i * line), text, _INK, font)
    for j, name in enumerate(columns):
        middle = left + gap + j * (width + gap) + width / 2
        draw.text((middle, top - gap / 2), name, _INK, font, anchor="md")
    for i, name in enumerate(rows):
        y = top + i * row_height
        draw.text((left, y + height / 2), name, _INK, font, anchor="rm")
        for j, picture in enumerate(cells[i]):
            x = left + gap + j * (width + gap)
            page.paste(picture, (x, y))
            if labels:
                place = (x + width / 2, y + height + line / 2)
                draw.text(place, labels[i][j], _INK, small, anchor="mm")
    for i, text in enumerate(below):
        draw.text((2 * gap, bottom + i * line), text, _PALE, small)
    return page


def _check(
    cells: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: Sequence[Sequence[str]] | None,
) -> None:
    if not rows or not columns:
        raise ValueError(f"rows and columns must not be empty, got {rows!r} and {columns!r}")
    tables: dict[str, Sequence[Sequence[Any]]] = {"cells": cells, "labels": labels or cells}
    for name, table in tables.items():
        shape = [len(row) for row in table]
        if shape != [len(columns)] * len(rows):
            raise ValueError(
                f"{name} must be {len(rows)} rows of {len(columns)}, as rows and columns name "
                f"them, got rows of {shape}"
            )
    sizes = {picture.size for row in cells for picture in row}
    if len(sizes) > 1:
        raise ValueError(f"cells must all be of one size, got {sorted(sizes)}")


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width`, if no single word is."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
