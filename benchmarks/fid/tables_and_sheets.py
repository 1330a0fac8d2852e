"""The table, the plot and the sheets of a run of `scripts/fid.py`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.fid.distances import Features
from benchmarks.pictures.comparison import NAMES
from benchmarks.pictures.reference import read
from benchmarks.pictures.picture_set import UNPATCHED, Row, Run
from tomesd.picture_grid import grid

Record = Mapping[str, Any]

# Key, heading, how a value is written. A column without any value is left out.
_COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("frechet", "{distance} ↓", "{:.2f}".format),
    ("kid", "{kernel} × 1000 ↓", lambda value: f"{1000 * value:.3f}"),
    ("precision", "precision ↑", "{:.3f}".format),
    ("recall", "recall ↑", "{:.3f}".format),
    ("psnr", "PSNR, dB ↑", "{:.1f}".format),
    ("ssim", "SSIM ↑", "{:.3f}".format),
    ("perceptual", "{perceptual} ↓", "{:.4f}".format),
    ("seconds", "s/im ↓", "{:.3f}".format),
    ("memory", "peak GB ↓", lambda value: f"{value / 1e9:.2f}"),
    ("largest_batch", "bs ↑", str),
    ("largest_side", "res ↑", lambda value: f"{value}²"),
]


def method_name(method: str) -> str:
    return {UNPATCHED: "unpatched", "prune": "random pruning"}.get(method) or NAMES[method]


def table(records: Sequence[Record], features: Features, count: int) -> str:
    """Markdown: a line for each row, a column for each figure that was measured.

    >>> print(table(results["rows"], Features("shapes"), 1000))
    | method | r % | Fréchet distance on Shapes features ↓ | ...

    count: pictures in each row, for a warning where they are few for the statistics.
    """
    columns = [
        column
        for column in _COLUMNS
        if any(record.get(column[0]) is not None for record in records)
    ]
    names = {
        "distance": features.distance,
        "kernel": features.kernel,
        "perceptual": features.perceptual,
    }
    headings = ["method", "r %", *(heading.format(**names) for _, heading, _ in columns)]
    lines = [_line(headings), "|---" * len(headings) + "|"]
    for record in records:
        cells = [method_name(record["method"]), f"{100 * record['ratio']:g}"]
        for key, _, written in columns:
            value = record.get(key)
            cells.append("–" if value is None else written(value))
        lines.append(_line(cells))
    if count <= features.width:
        lines += [
            "",
            f"{count} pictures describe {features.width} features only in part, so the Fréchet "
            "distance is too large: compare rows of this table alone.",
        ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def about(results: Mapping[str, Any]) -> str:
    """What stands under the table: with which settings, command and versions it was made."""
    settings, environment = results["settings"], results["environment"]
    versions = {name: value for name, value in environment.items() if name.endswith("_version")}
    told = [f"`{results['command']}`", ""]
    for name, value in settings.items():
        if name not in ("device", "versions"):  # which follow
            told.append(f"- {name}: {_plainly(value)}")
    told.append(f"- device: {environment['device_name']}, {environment['threads']} threads")
    told += [f"- {name.removesuffix('_version')} {value}" for name, value in versions.items()]
    return "\n".join(told)


def _plainly(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return str(value)


def plot(records: Sequence[Record], distance: str, path: Path) -> None:
    """Distance over seconds for a picture: a line for each method, from the unpatched point on.

    >>> plot(results["rows"], "FID", Path("plot.png"))
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    start = records[0]
    axes.plot(start["seconds"], start["frechet"], "ko", label=method_name(UNPATCHED), zorder=3)
    for method in dict.fromkeys(record["method"] for record in records[1:]):
        line = [record for record in records[1:] if record["method"] == method]
        points = sorted([start, *line], key=lambda record: record["ratio"])
        axes.plot(
            [point["seconds"] for point in points],
            [point["frechet"] for point in points],
            "o-",
            label=method_name(method),
        )
        for point in line:
            axes.annotate(
                f"{100 * point['ratio']:g}%",
                (point["seconds"], point["frechet"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize="small",
            )
    axes.set_xlabel("seconds per picture")
    axes.set_ylabel(distance)
    axes.grid(alpha=0.3)
    axes.margins(0.1)  # room for the labels
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def figure_11(run: Run, index: int = 0) -> Image.Image:
    """One prompt and seed: a row for each method, a column for each ratio (ToMe, Figure 11)."""
    methods = list(dict.fromkeys(row.method for row in run.rows[1:]))
    ratios = sorted({row.ratio for row in run.rows[1:]})
    there = {(row.method, row.ratio): row for row in run.rows}
    first = read(run.path(run.rows[0], index))
    blank = Image.new("RGB", first.size, "white")
    cells = []
    for method in methods:
        chosen = [there.get((method, ratio)) for ratio in ratios]
        made = [read(run.path(row, index)) if row else blank for row in chosen]
        cells.append([first, *made])
    return grid(
        cells or [[first]],
        rows=[method_name(method) for method in methods] or [UNPATCHED],
        columns=[UNPATCHED, *(f"{100 * ratio:g}%" for ratio in ratios)],
        title=run.prompts[index],
        caption=_caption(run, f"seed {index}"),
    )


def figure_12(run: Run, count: int = 8) -> Image.Image:
    """Samples: a row for each row of the table, a column for each prompt (ToMe, Figure 12)."""
    step = max(1, len(run.prompts) // count)
    chosen = range(0, len(run.prompts), step)[:count]
    return grid(
        [[read(run.path(row, index)) for index in chosen] for row in run.rows],
        rows=[row_name(row) for row in run.rows],
        columns=[f"seed {index}" for index in chosen],
        caption="; ".join(f"{index}: {run.prompts[index]}" for index in chosen),
    )


def row_name(row: Row) -> str:
    return f"{method_name(row.method)} {100 * row.ratio:g}%" if row.settings else UNPATCHED


def _caption(run: Run, more: str) -> str:
    how = run.sampling
    return f"{how.width}x{how.height} px, {how.steps} steps, guidance {how.guidance:g}, {more}"
