"""The tables and plots of scripts/classify.py."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import markdown
from tomesd.pictures.files import atomic_write

Record = dict[str, Any]

TITLES = {
    "sweep": "Tokens merged per layer (ToMe, Figure 3)",
    "ablation": "Choices of the method (ToMe, Table 1)",
    "algorithms": "Algorithms (ToMe, Table 2)",
    "schedules": "Schedules (ToMe, Figures 2 and 7)",
    "orders": "Orders of the tokens of a layer (ToMe, Table 1e)",
}


def table(records: Sequence[Record], part: str) -> str:
    """Markdown: a title, and a row for each experiment of a part but random schedules.

    >>> print(table(records, "algorithms"))
    Algorithms (ToMe, Table 2)
    | | accuracy, % | images/s | times as fast | times fewer multiply-adds |
    """
    headings = ["", "accuracy, %", "images/s", "times as fast", "times fewer multiply-adds"]
    rows = [
        [
            record["name"],
            markdown.figure(record.get("accuracy"), 1, 100),
            markdown.figure(record.get("images_per_second"), 1),
            markdown.figure(record.get("times_as_fast"), 2),
            markdown.figure(record["times_fewer_multiply_adds"], 2),
        ]
        for record in records
        if record["part"] == part and not record["name"].startswith("random ")
    ]
    return f"{TITLES[part]}\n{markdown.table(headings, rows)}"


def plots(records: Sequence[Record], folder: Path, model: str) -> list[Path]:
    """sweep.png and schedules.png, as far as there are experiments with an accuracy.

    >>> plots(records, Path("runs/classify"), "embedded")
    """
    seen = [record for record in records if record.get("accuracy") is not None]
    written = []
    sweep = [r for r in seen if r["part"] == "sweep" and r.get("times_as_fast") is not None]
    if sweep:
        figure, axes = _axes("times as fast as unpatched, measured", f"{model}: merging r tokens")
        x, y = _points(sweep, "times_as_fast")
        axes.plot(x, y, "o-", color="tab:blue")
        for index, (at, record) in enumerate(zip(zip(x, y, strict=True), sweep, strict=True)):
            # On alternating sides of the line: points of small r are close to each other.
            offset, side = ((5, 5), "left") if index % 2 == 0 else ((-5, -12), "right")
            name = record["name"].replace(" ", "")
            axes.annotate(name, at, offset, textcoords="offset points", fontsize=8, ha=side)
        written.append(_save(figure, folder / "sweep.png"))
    schedules = [r for r in seen if r["part"] == "schedules"]
    if schedules:
        figure, axes = _axes("times fewer multiply-adds", f"{model}: merging schedules")
        for kind, style in (("random", "."), ("constant", "o-"), ("decreasing", "s-")):
            chosen = [r for r in schedules if re.match(kind, r["name"])]
            color = "lightgray" if kind == "random" else None
            axes.plot(*_points(chosen, "times_fewer_multiply_adds"), style, color=color, label=kind)
        axes.legend()
        written.append(_save(figure, folder / "schedules.png"))
    return written


def _points(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    return [r[key] for r in records], [100 * r["accuracy"] for r in records]


def _axes(x: str, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel="accuracy, %", title=title)
    axes.margins(0.1)  # The last name beside its point stays inside.
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return path
