"""The table and the plot of scripts/steps.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import markdown
from benchmarks.steps.recipes import CALIBRATED_WORK

Rows = Sequence[Mapping[str, Any]]
# At each share of the work: name, color and marker.
LINES = {
    "merge": ("tab:red", "o"),
    "merge late": ("darkred", "P"),
    "cache": ("tab:brown", "D"),
    "both": ("tab:pink", "s"),
}
_COLUMNS = (("work", 2), ("psnr", 1), ("ssim", 3), ("right", 1))


def mean(rows: Rows, value: str = "psnr", **key: Any) -> float | None:
    """The mean over the seeds; None if nothing was measured.

    >>> mean(rows, model="unet", steps=25, recipe="cache 0.6")
    45.1
    """
    found = each_seed(rows, value, **key)
    return fmean(found) if found else None


def each_seed(rows: Rows, value: str = "psnr", **key: Any) -> list[float]:
    """What was measured, for each seed.

    >>> each_seed(rows, model="unet", steps=25, recipe="cache 0.6")
    [45.1, 44.8]
    """
    found = [row[value] for row in rows if all(row[name] == key[name] for name in key)]
    return [each for each in found if each is not None]


def by_block(rows: Rows) -> str:
    """Markdown: a ratio for each block beside one for all, at each share of the work.

    >>> print(by_block(rows))
    | model | steps | block work | merge | by block | merge late | late, by block |
    """
    names = ("merge", "merge by block", "merge late", "merge late by block")
    lines = []
    for model, steps in sorted({(row["model"], row["steps"]) for row in rows}):
        key = {"model": model, "steps": steps}
        for share in CALIBRATED_WORK:
            psnr = [mean(rows, **key, recipe=f"{name} {share:g}") for name in names]
            if any(psnr):
                cells = [markdown.figure(value, 1) for value in psnr]
                lines.append([model, str(steps), f"{share:.0%}", *cells])
    headings = ["model", "steps", "block work", "merge", "by block", "merge late", "late, by block"]
    return markdown.table(headings, lines)


def table(rows: Rows) -> str:
    """Markdown: a row for each model, number of steps and recipe; means over the seeds."""
    keys = sorted({(row["model"], row["steps"], row["recipe"]) for row in rows})
    return markdown.table(
        ["model", "steps", "recipe", "block work", "PSNR, dB", "SSIM", "right"],
        [
            [
                *map(str, key),
                *(
                    markdown.figure(mean(rows, value, model=key[0], steps=key[1], recipe=key[2]), n)
                    for value, n in _COLUMNS
                ),
            ]
            for key in keys
        ],
    )


def plot(rows: Rows, path: Path) -> None:
    """PSNR at equal work over the number of steps: a row for each model, a panel for each share.

    >>> plot(rows, Path("steps.png"))
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    shares = (0.4, 0.6, 0.8)
    ticks = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(11, 3.4 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(shares), sharex=True, sharey=True, squeeze=False)
    for model, line in zip(models, panels, strict=True):
        counts = sorted({row["steps"] for row in rows if row["model"] == model})
        for share, axes in zip(shares, line, strict=True):
            for name, (color, marker) in LINES.items():
                found = {
                    steps: mean(rows, model=model, steps=steps, recipe=f"{name} {share:g}")
                    for steps in counts
                }
                points = [(steps, psnr) for steps, psnr in found.items() if psnr is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
            axes.set_xscale("log")
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.set_title(f"{model}, {share:.0%} of the blocks' work")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("PSNR to the whole model, dB")
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    panels[0, 0].legend()
    figure.savefig(path, format="png", dpi=110)
