"""The table, the plot and the sheets of samples of a run of scripts/fid.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.common import markdown
from benchmarks.fid.distances import Features
from benchmarks.pictures.picture_set import UNPATCHED, Method, PictureSet
from benchmarks.pictures.reference import read
from tomesd.pictures.comparison import NAMES
from tomesd.pictures.grid import grid

Record = Mapping[str, Any]

# Key, heading, format. A column without any value is left out.
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
    """The name of a method in tables: "ToMe", "random pruning" or "unpatched"."""
    return {UNPATCHED: "unpatched", "prune": "random pruning"}.get(method) or NAMES[method]


def table(records: Sequence[Record], features: Features) -> str:
    """Markdown: a row for each method and ratio, a column for each measured figure.

    >>> print(table(results["rows"], Features("shapes")))
    | method | r % | Fréchet distance on Shapes features ↓ | ...
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
    rows = []
    for record in records:
        cells = [method_name(record["method"]), f"{100 * record['ratio']:g}"]
        for key, _, text in columns:
            value = record.get(key)
            cells.append(markdown.MISSING if value is None else text(value))
        rows.append(cells)
    headings = ["method", "r %", *(heading.format(**names) for _, heading, _ in columns)]
    return markdown.table(headings, rows)


def few_pictures_note(count: int, features: Features) -> str:
    """A warning if there are too few pictures for the features; otherwise "".

    >>> few_pictures_note(1000, Features("shapes"))
    ''
    """
    if count > features.width:
        return ""
    return (
        f"The covariance of {features.width} features of {count} pictures is singular, so the "
        "Fréchet distance is biased upwards: compare rows of this table only."
    )


def settings_text(results: Mapping[str, Any]) -> str:
    """The text below the table: the command, settings, device and versions."""
    settings, environment = results["settings"], results["environment"]
    versions = {name: value for name, value in environment.items() if name.endswith("_version")}
    shown = {name: value for name, value in settings.items() if name not in ("device", "versions")}
    shown["device"] = f"{environment['device_name']}, {environment['threads']} threads"
    return f"`{results['command']}`\n\n{markdown.settings_list(shown | versions)}"


def plot(records: Sequence[Record], distance: str, path: Path) -> None:
    """Distance over seconds per picture: a line for each method, starting at the unpatched point.

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


def methods_sheet(pictures: PictureSet, index: int = 0) -> Image.Image:
    """One prompt and seed: a row for each method, a column for each ratio (ToMe, Figure 11).

    >>> methods_sheet(pictures).save("methods.png")
    """
    methods = list(dict.fromkeys(method.method for method in pictures.methods[1:]))
    ratios = sorted({method.ratio for method in pictures.methods[1:]})
    by_name = {(method.method, method.ratio): method for method in pictures.methods}
    first = read(pictures.path(pictures.methods[0], index))
    blank = Image.new("RGB", first.size, "white")
    cells = []
    for name in methods:
        row = [by_name.get((name, ratio)) for ratio in ratios]
        images = [read(pictures.path(method, index)) if method else blank for method in row]
        cells.append([first, *images])
    return grid(
        cells or [[first]],
        rows=[method_name(method) for method in methods] or [UNPATCHED],
        columns=[UNPATCHED, *(f"{100 * ratio:g}%" for ratio in ratios)],
        title=pictures.prompts[index],
        caption=_caption(pictures, f"seed {index}"),
    )


def samples_sheet(pictures: PictureSet, count: int = 8) -> Image.Image:
    """A row for each method and ratio, a column for each of some prompts (ToMe, Figure 12).

    >>> samples_sheet(pictures).save("samples.png")
    """
    step = max(1, len(pictures.prompts) // count)
    chosen = range(0, len(pictures.prompts), step)[:count]
    return grid(
        [[read(pictures.path(method, i)) for i in chosen] for method in pictures.methods],
        rows=[_row_name(method) for method in pictures.methods],
        columns=[f"seed {index}" for index in chosen],
        caption="; ".join(f"{index}: {pictures.prompts[index]}" for index in chosen),
    )


def _row_name(method: Method) -> str:
    if not method.settings:
        return UNPATCHED
    return f"{method_name(method.method)} {100 * method.ratio:g}%"


def _caption(pictures: PictureSet, more: str) -> str:
    how = pictures.sampling
    return f"{how.width}x{how.height} px, {how.steps} steps, guidance {how.guidance:g}, {more}"
