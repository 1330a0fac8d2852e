"""The cost model's tables: work at each level of a denoiser, and what merging can gain there."""

import math
from collections.abc import Iterable, Sequence

from benchmarks.common import markdown
from benchmarks.cost.counts import Count, merged
from benchmarks.models.unets import Level
from tomesd.core import cost, workload
from tomesd.core.workload import Branches, Work

# What merges, by its name in the tables.
MERGES = {
    "attention": Branches(),
    "keys and values": Branches(merge_queries=False),
    "blocks": Branches(merge_block=True),
}

# The share of the ideal saving that the patch should reach.
SHARE = 0.95

# Bytes in the tables are those of half precision.
_ITEMSIZE = 2


def levels_table(counts: Iterable[Count], ratio: float, window: int) -> str:
    """Markdown: the work of one block at each level, GFLOP (GB).

    >>> print(levels_table([count(MODELS["sd15"], 512)], ratio=0.5, window=32))
    | model | px | tokens × channels | blocks | attention | linear layers | ...

    ratio: of the tokens that merge, for matching, merging and unmerging.
    """
    headings = [
        "model",
        "px",
        "tokens × channels",
        "blocks",
        "attention",
        "linear layers",
        "matching",
        "matching, no windows",
        "merge",
        "unmerge",
    ]
    rows = []
    for counted, level in _each_level(counts):
        r = merged(level, ratio)
        block = counted.block(level)
        near, far = (counted.patch(level, r, Branches(), side) for side in (window, None))
        rows.append(
            [
                *_place(counted, level),
                str(level.blocks),
                _work(block, "attention"),
                _work(block, "linear"),
                _work(near, "match"),
                _work(far, "match"),
                _work(near, "merge"),
                _work(near, "unmerge"),
            ]
        )
    return markdown.table(headings, rows)


def shares_table(counts: Iterable[Count]) -> str:
    """Markdown: FLOPs of one forward, and the share of each kind of layer.

    >>> print(shares_table([count(MODELS["sd15"], 512)]))
    | model | px | batch | TFLOP | convolutions | attention | linear layers | ...

    The last columns: the share of the blocks of the finest level with attention, where merging acts
    by default, and of all blocks: a little above 100% for SD3, whose last block leaves out a part
    of its text.
    """
    headings = [
        "model",
        "px",
        "batch",
        "TFLOP",
        "convolutions",
        "attention",
        "linear layers",
        "blocks of the finest level",
        "all blocks",
    ]
    rows = []
    for counted in counts:
        inside = [level.blocks * workload.flops(counted.block(level)) for level in counted.levels]
        parts = [counted.convolutions, counted.attention, counted.linear, inside[0], sum(inside)]
        cells = [counted.model.title, str(counted.size), str(counted.batch)]
        shares = [f"{part / counted.flops:.0%}" for part in parts]
        rows.append([*cells, _figure(counted.flops / 1e12), *shares])
    return markdown.table(headings, rows)


def ideal_table(counts: Iterable[Count], ratios: Sequence[float]) -> str:
    """Markdown: the largest possible speedup of a whole forward at these ratios.

    >>> print(ideal_table([count(MODELS["sd15"], 512)], ratios=[0.5]))
    | model | px | attention, finest level | ...

    All FLOPs are counted, those of convolutions too; matching and merging cost nothing.
    """
    columns = [
        (f"{name}, {where}", branches, where == "every level")
        for name, branches in MERGES.items()
        for where in ("finest level", "every level")
    ]
    rows = []
    for counted in counts:
        cells = []
        for _, branches, everywhere in columns:
            if everywhere and len(counted.levels) == 1:
                cells.append("the same")
                continue
            gains = [counted.ideal(ratio, branches, everywhere) for ratio in ratios]
            cells.append(" / ".join(f"{gain:.2f}" for gain in gains))
        rows.append([counted.model.title, str(counted.size), *cells])
    return markdown.table(["model", "px", *(name for name, _, _ in columns)], rows)


def budget_table(counts: Iterable[Count], ratio: float, window: int) -> str:
    """Markdown: what merging saves in one block, may cost, and is estimated to cost.

    >>> print(budget_table([count(MODELS["sd15"], 512)], ratio=0.5, window=32))
    | model | px | tokens × channels | what merges | cpu, ms: saves | may spend | ...

    It may cost 5% of what it saves, so that 95% of the ideal saving is reached. Milliseconds on
    the CPU and microseconds on the GPU of `tomesd.core.cost`'s rates.
    """
    units = (("cpu", "ms", 1e3), ("cuda", "µs", 1e6))
    columns = [
        heading
        for kind, unit, _ in units
        for heading in (f"{kind}, {unit}: saves", "may spend", "spends", "pays")
    ]
    rows = []
    for counted, level in _each_level(counts):
        r = merged(level, ratio)
        for name, branches in MERGES.items():
            full, less = counted.block(level), counted.block(level, r, branches)
            cells = [*_place(counted, level), name]
            for kind, _, times in units:
                # On a GPU kernels merge, and Python prepares each operator.
                own = counted.patch(level, r, branches, window, fused=kind != "cpu")
                saved, spent = cost.weigh(full, less, own, kind, joint=counted.model.joint)
                cells += [_figure(times * part) for part in (saved, (1 - SHARE) * saved, spent)]
                cells.append("yes" if saved > spent else "no")
            rows.append(cells)
    return markdown.table(["model", "px", "tokens × channels", "what merges", *columns], rows)


# Cards of the table of `cards_table`, of those that `cost.PUBLISHED` knows.
CARDS = ("RTX 3060", "RTX 3090", "RTX 4070", "RTX 4090", "RTX 5090", "A100", "H100")


def cards_table(counts: Iterable[Count], ratio: float, window: int) -> str:
    """Markdown: how many times as fast merging whole blocks is expected to make them, by card.

    >>> print(cards_table([count(MODELS["sd15"], 512)], ratio=0.5, window=32))
    | model | px | tokens × channels | RTX 3060 | ...

    Eager / in a graph. A dash: it would not be faster, and `only_where_it_pays` leaves it alone.
    """
    rows = []
    for counted, level in _each_level(counts):
        r, whole = merged(level, ratio), Branches(merge_block=True)
        full, less = counted.block(level), counted.block(level, r, whole)
        own = counted.patch(level, r, whole, window, fused=True)
        cells = []
        for card in CARDS:
            gains = []
            for eager in (True, False):
                found = cost.weigh(full, less, own, card, joint=counted.model.joint, eager=eager)
                host = cost.host_seconds(card, counted.model.joint) if eager else 0.0
                before = max(cost.seconds(full, card), host)
                after = before - found.saved + found.spent
                gains.append(f"{before / after:.2f}" if found.pays else markdown.MISSING)
            cells.append(" / ".join(gains))
        rows.append([*_place(counted, level), *cells])
    return markdown.table(["model", "px", "tokens × channels", *CARDS], rows)


def _each_level(counts: Iterable[Count]) -> list[tuple[Count, Level]]:
    return [(counted, level) for counted in counts for level in counted.levels]


def _place(counted: Count, level: Level) -> list[str]:
    where = f"{level.h * level.w:,} × {level.channels:,}"
    return [counted.model.title, str(counted.size), where]


def _work(work: Iterable[Work], part: str) -> str:
    """FLOPs, and bytes in parentheses, of one part."""
    chosen = [each for each in work if each.part == part]
    moved = f"({_figure(_ITEMSIZE * workload.elements(chosen) / 1e9)})"
    flops = workload.flops(chosen)
    return f"{_figure(flops / 1e9)} {moved}" if flops else moved


def _figure(value: float) -> str:
    """At least two digits, without an exponent."""
    if value == 0 or value >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"
