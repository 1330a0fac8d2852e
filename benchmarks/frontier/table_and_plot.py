"""The table and the plot of scripts/frontier.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.common import markdown
from benchmarks.fid.tables_and_sheets import few_pictures_note
from benchmarks.frontier.candidates import BOTH, CACHE, LATE, PEER
from benchmarks.frontier.plan import FEATURES
from benchmarks.frontier.results import pareto_front

Record = Mapping[str, Any]

# Color and marker of each family. Circles are settings of this project.
_LOOKS = {
    "unpatched": ("black", "s"),
    "self-attention": ("tab:blue", "o"),
    "no proportional attention": ("tab:cyan", "o"),
    "plain means": ("lightblue", "o"),
    "keys and values": ("tab:green", "o"),
    "refined by k-means": ("lime", "o"),
    "whole blocks": ("tab:red", "o"),
    LATE: ("darkred", "P"),
    "every branch (the paper)": ("tab:purple", "o"),
    "grid of keys and values (ToDo)": ("olive", "^"),
    "random pruning": ("tab:gray", "X"),
    PEER: ("tab:orange", "*"),
    CACHE: ("tab:brown", "D"),
    BOTH: ("tab:pink", "D"),
}
# Key, name, and whether more of it is better.
_MEASURES = [
    ("psnr", "PSNR to unpatched, dB", True),
    ("frechet", FEATURES.distance, False),
]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each candidate.

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
    rows = [
        [
            str(number),
            _title(row),
            f"failed: {row['error']}" if "error" in row else markdown.spread(row.get("speedup"), 3),
            markdown.figure(row.get("psnr"), 1),
            markdown.figure(row.get("frechet"), 2),
            _percent(row["attention_left"]["large"]),
            _frontiers(row),
        ]
        for number, row in enumerate(results["rows"])
    ]
    notes = [
        "Times as fast as the unpatched model: medians over rounds, with quartiles. On the "
        "frontier: no other candidate is as fast and as good by that measure; in parentheses: no "
        "other setting of this project with the same ratio in every step. Attention left: the "
        "share of self-attention's query–key pairs that is still computed at the timed size."
    ]
    if results["quality"]:
        notes.append(few_pictures_note(results["quality"]["images"], FEATURES))
    return "\n".join([markdown.table(headings, rows), "", *filter(None, notes)])


def _percent(share: float | None) -> str:
    return markdown.MISSING if share is None else f"{share:.0%}"


def _title(row: Record) -> str:
    return f"{row['name']} ({row['shipped_as']})" if row["shipped_as"] else row["name"]


def _frontiers(row: Record) -> str:
    names = {"psnr": "PSNR", "frechet": "Fréchet"}
    among_all, among_settings = row["frontier"], row["settings_frontier"]
    cells = [names[measure] for measure in among_all]
    cells += [f"({names[measure]})" for measure in among_settings if measure not in among_all]
    return ", ".join(cells)


def settings_text(results: Mapping[str, Any]) -> str:
    """The text below the table: the command, and the settings and versions of each half."""
    parts = [f"`{results['command']}`"]
    for half in ("quality", "speed"):
        if results[half]:
            parts += [f"{half}:", markdown.settings_list(results[half])]
    return "\n\n".join(parts)


def has_both_halves(results: Mapping[str, Any]) -> bool:
    """Whether any candidate has both a quality and a time, for the plot."""
    return any(_points(results["rows"], measure) for measure, _, _ in _MEASURES)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Quality over speed, a panel for each measure, with the frontiers; up is better in all.

    >>> plot(results, Path("frontier.png"))

    Points have the numbers of the table, with a key beside the panels; the default and the presets
    are named.
    """
    timed = [(number, row) for number, row in enumerate(results["rows"]) if "speedup" in row]
    # High enough for the key.
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
        best = [among[i] for i in pareto_front([(_x(row), sign * row[measure]) for row in among])]
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
