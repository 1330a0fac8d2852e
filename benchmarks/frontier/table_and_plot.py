"""The table and the picture of `scripts/frontier.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.frontier.candidates import PEER
from benchmarks.frontier.measurements import FEATURES, frontier

Record = Mapping[str, Any]

# Color and marker of each family. Circles are settings of this project.
_LOOKS = {
    "unpatched": ("black", "s"),
    "self-attention": ("tab:blue", "o"),
    "no log size": ("tab:cyan", "o"),
    "plain means": ("lightblue", "o"),
    "keys and values": ("tab:green", "o"),
    "groups looked for again": ("lime", "o"),
    "whole blocks": ("tab:red", "o"),
    "not in the first fifth of the steps": ("darkred", "P"),
    "every branch (the paper)": ("tab:purple", "o"),
    "keys and values of a grid": ("olive", "^"),
    "a map kept over steps": ("tab:pink", "D"),
    "cheaper matching": ("tab:brown", "D"),
    "random pruning": ("tab:gray", "X"),
    PEER: ("tab:orange", "*"),
}
# Key, name, and whether more of it is better.
_MEASURES = [
    ("psnr", "PSNR to unpatched, dB", True),
    ("frechet", FEATURES.distance, False),
]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a line for each candidate.

    >>> print(table(results))
    | # | candidate | times as fast | ...
    """
    headings = [
        "#",
        "candidate",
        "times as fast",
        "PSNR to unpatched, dB",
        FEATURES.distance,
        "attention left",
        "on the frontier",
    ]
    lines = [_line(headings), "|---" * len(headings) + "|"]
    for number, row in enumerate(results["rows"]):
        figures = [
            str(number),
            _title(row),
            _speed(row),
            "–" if row.get("psnr") is None else f"{row['psnr']:.1f}",
            "–" if row.get("frechet") is None else f"{row['frechet']:.2f}",
            f"{row['attention_left']['large']:.0%}",
            _frontier(row),
        ]
        lines.append(_line(figures))
    lines += [
        "",
        "Times as fast as the unpatched model: medians over rounds, with quartiles. On the "
        "frontier: no other candidate is as fast and as good by that measure; in brackets: none "
        "of this project's settings that are the same in every step. Attention left: the share of "
        "self-attention's query–key pairs that is still computed at the size that is timed.",
    ]
    quality = results["quality"]
    if quality and quality["images"] <= FEATURES.width:
        lines.append(
            f"{quality['images']} pictures describe {FEATURES.width} features only in part, so "
            "the Fréchet distance is too large: compare rows of this table alone."
        )
    return "\n".join(lines)


def _title(row: Record) -> str:
    return f"{row['name']} ({row['shipped_as']})" if row["shipped_as"] else row["name"]


def _speed(row: Record) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    if "speedup" not in row:
        return "–"
    return "{median:.3f} ({low:.3f}–{high:.3f})".format(**row["speedup"])


def _frontier(row: Record) -> str:
    names = {"psnr": "PSNR", "frechet": "Fréchet"}
    among_all, among_settings = row["frontier"], row["settings_frontier"]
    told = [names[measure] for measure in among_all]
    told += [f"({names[measure]})" for measure in among_settings if measure not in among_all]
    return ", ".join(told)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def about(results: Mapping[str, Any]) -> str:
    """What stands under the table: the command, and what each half was measured with."""
    lines = [f"`{results['command']}`"]
    for half in ("quality", "speed"):
        if results[half]:
            lines += ["", f"{half}:", ""]
            lines += [
                f"- {name.removesuffix('_version')}: {_plainly(value)}"
                for name, value in results[half].items()
                if value is not None
            ]
    return "\n".join(lines)


def _plainly(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.removesuffix('_version')}={item}" for name, item in value.items())
    return str(value)


def can_plot(results: Mapping[str, Any]) -> bool:
    """Whether both halves are there."""
    return any(_points(results["rows"], measure) for measure, _, _ in _MEASURES)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Quality over speed, a panel for each measure, with the frontier drawn; up is better in all.

    >>> plot(results, Path("frontier.png"))

    Points have the numbers of the table, and a key beside the panels; the default and the presets
    are named.
    """
    timed = [(number, row) for number, row in enumerate(results["rows"]) if "speedup" in row]
    # As high as the key.
    figure = Figure(figsize=(11, max(8, 0.2 * len(timed))), layout="constrained")
    panels = figure.subplots(len(_MEASURES), 1)
    for axes, (measure, name, more_is_better) in zip(panels, _MEASURES, strict=True):
        _panel(axes, results["rows"], measure, more_is_better)
        axes.set_xlabel(f"times as fast as unpatched ({_where(results['speed'])})")
        axes.set_ylabel(name)
    panels[0].legend(loc="upper right")
    key = [
        Line2D([], [], linestyle="", **_look(row), label=f"{number}  {_title(row)}")
        for number, row in timed
    ]
    figure.legend(handles=key, loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, format="png", dpi=120)


def _look(row: Record) -> dict[str, Any]:
    color, marker = _LOOKS[row["family"]]
    return {"color": color, "marker": marker, "markersize": 11 if marker == "*" else 7}


def _points(rows: Sequence[Record], measure: str) -> list[Record]:
    return [row for row in rows if row.get(measure) is not None and "speedup" in row]


def _panel(axes: Axes, rows: Sequence[Record], measure: str, more_is_better: bool) -> None:
    sign = 1 if more_is_better else -1
    points = _points(rows, measure)
    settings = [row for row in points if row["is_setting"] or row["settings"] is None]
    lines = [("of all", points, "0.6", "--"), ("of steady settings", settings, "black", "-")]
    for name, among, color, style in lines:
        best = [among[i] for i in frontier([(_x(row), sign * row[measure]) for row in among])]
        line = ([_x(row) for row in best], [row[measure] for row in best])
        axes.plot(*line, color=color, linestyle=style, linewidth=1, label=f"frontier {name}")
    numbered = [(number, row) for number, row in enumerate(rows) if row in points]
    for _, row in numbered:
        axes.plot(_x(row), row[measure], zorder=3, **_look(row))
    middle = sum(axes.get_xlim()) / 2
    for number, row in numbered:
        is_right = _x(row) > middle
        axes.annotate(
            f"{number} {row['shipped_as']}".strip(),
            (_x(row), row[measure]),
            xytext=(-5 if is_right else 5, 4),
            textcoords="offset points",
            ha="right" if is_right else "left",
            fontsize="small",
            color=_LOOKS[row["family"]][0],
        )
    axes.grid(alpha=0.3)
    if not more_is_better:
        axes.invert_yaxis()


def _x(row: Record) -> float:
    return row["speedup"]["median"]


def _where(speed: Mapping[str, Any]) -> str:
    device = speed["accelerator"] or f"{speed['cpu']}, {speed['threads']} threads"
    return f"{speed['model']}, {speed['size']} px, {speed['precision']}, {device}"
