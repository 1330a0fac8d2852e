"""docs/gpu.md: what scripts/gpu.py measured on each device, from all files in results/."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.common.markdown import MISSING, figure, spread
from benchmarks.results.files import ROOT, Record

COMMAND = "python scripts/gpu.py"
KERNELS_COMMAND = f"{COMMAND} --device cpu --part compiled --output results/kernels.json"

Rows = Mapping[str, Record]


def measured(root: Path = ROOT) -> dict[str, Record]:
    """The files in results/ that scripts/gpu.py wrote on a GPU, by the device's name."""
    found = {}
    for file in sorted((root / "results").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("suite") == "gpu" and record["environment"]["type"] != "cpu":
            found[record["environment"]["device"]] = record
    return found


def page(root: Path = ROOT) -> str:
    """A section for each device, with a table for each part that it has."""
    sections = [_section(record) for record in measured(root).values()]
    return "\n\n".join(sections) or "No GPU has been measured yet."


def kernels(record: Record) -> str:
    """Registers a thread and KiB of shared memory of each kernel, at most, by architecture."""
    names: dict[str, dict[str, str]] = {}
    for architecture, row in record["parts"]["compiled"].items():
        for name, used in row["kernels"].items():
            cell = f"{used['registers']}, {figure(used['shared'] / 1024, 1)}"
            names.setdefault(name, {})[architecture] = cell
    columns = list(record["parts"]["compiled"])
    return markdown.table(
        ["kernel, dtype", *columns],
        [[name, *(cells.get(each, MISSING) for each in columns)] for name, cells in names.items()],
    )


def _section(record: Record) -> str:
    about = record["environment"]
    title = f"## {about['device']}"
    lines = [
        f"{about['precision']}, torch {about['torch_version']}, triton {about['triton_version']}, "
        f"diffusers {about['diffusers_version']}: `{record['command']}`."
    ]
    for name, (heading, render) in _PARTS.items():
        rows = record["parts"].get(name, {})
        whole = {case: row for case, row in rows.items() if "error" not in row}
        if whole:
            lines.append(f"### {heading}\n\n{render(whole)}")
        failed = [f"- {case}: {row['error']}" for case, row in rows.items() if "error" in row]
        if failed:
            lines.append("Failed:\n\n" + "\n".join(failed))
    return "\n\n".join([title, *lines])


def _right(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return markdown.table(
        ["", *names],
        [[case, *(_value(row.get(name)) for name in names)] for case, row in rows.items()],
    )


def _value(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (f"{value:.2g}" if isinstance(value, float) else str(value)) or "none"


def _cost(rows: Rows) -> str:
    cells = []
    for case, row in rows.items():
        for variant, own in row.items():
            if "error" in own:
                continue
            steps = [_micro(own.get(step)) for step in ("match", "merge", "unmerge")]
            cells.append([case, variant, *steps, _micro(own.get("all", own))])
    return markdown.table(["", "", "match, µs", "merge, µs", "unmerge, µs", "all, µs"], cells)


def _micro(value: Any) -> str:
    return figure(value["median"], 0, 1e6) if value and "median" in value else MISSING


def _rates(rows: Rows) -> str:
    return markdown.table(
        ["", ""], [[name, f"{value:.3g}"] for row in rows.values() for name, value in row.items()]
    )


def _forwards(rows: Rows) -> str:
    cells = []
    for case, row in rows.items():
        bound = rows.get(f"{case}, bound", {})
        for own in row.get("rows", ()):
            memory = own.get("memory")
            cells.append(
                [
                    case,
                    own["variant"],
                    spread(own.get("median_seconds"), 1, 1e3),
                    spread(own.get("speedup"), 2),
                    spread(own.get("share_of_ideal"), 0, 100, "%"),
                    f"{memory['peak'] / 2**30:.2f}" if memory else MISSING,
                    bound.get(own["variant"], {}).get("bound", MISSING),
                ]
            )
    headings = ["", "", "ms", "times as fast", "share of the ideal saving", "peak, GiB", "bound by"]
    return markdown.table(headings, cells)


def _attention(rows: Rows) -> str:
    cells = []
    for case, row in rows.items():
        for form, own in row.items():
            kernel = (own.get("kernels") or [MISSING])[0].replace("|", "\\|")
            times = _micro(own.get("seconds"))
            cells.append([case, form, times, spread(own.get("of none"), 2), f"`{kernel}`"])
    return markdown.table(["", "log(size)", "µs", "relative to none", "longest kernel"], cells)


def _vits(rows: Rows) -> str:
    return markdown.table(
        ["", "", "pictures per second", "times as fast"],
        [
            [case, name, spread(own["pictures per second"], 0), spread(own["times as fast"], 2)]
            for case, row in rows.items()
            for name, own in row.items()
            if "error" not in own
        ],
    )


def _limits(rows: Rows) -> str:
    return markdown.table(
        ["SD1.5", "largest batch at 512 px", "largest picture, px"],
        [[case, str(row["batch"]), str(row["side"])] for case, row in rows.items()],
    )


_PARTS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "right": ("Right", _right),
    "forwards": ("Forwards", _forwards),
    "cost": ("The patch's own work, batch 2", _cost),
    "attention": ("Proportional attention", _attention),
    "vits": ("Vision Transformers", _vits),
    "limits": ("What fits", _limits),
    "rates": ("Rates of the cost model", _rates),
}
