"""The command of scripts/cost.py: the cost model's tables, from shapes alone."""

from argparse import ArgumentParser, Namespace
from functools import cache

from benchmarks.common.arguments import Command, number
from benchmarks.cost.counts import MODELS, STEP, Count, count
from benchmarks.cost.tables import (
    budget_table,
    cards_table,
    ideal_table,
    levels_table,
    shares_table,
)
from tomesd.core.merging_work import WINDOW

TABLES = ("levels", "shares", "ideal", "budget", "cards")


def prepare(args: Namespace) -> Namespace:
    for size in args.size:
        if size % STEP:
            raise ValueError(f"--size must be a multiple of {STEP}, got {size}")
    return args


def run(args: Namespace) -> None:
    print("\n\n".join(render(args)))


def render(args: Namespace) -> list[str]:
    """The tables that the options ask for.

    >>> render(main.parser().parse_args(["--table", "shares", "--model", "sd15"]))
    ['| model | px | batch | TFLOP | ...']
    """
    counts = [_count(name, size, args.batch) for name in args.model for size in args.size]
    tables = []
    for name in args.table:
        if name == "shares":
            tables.append(shares_table(counts))
        if name == "ideal":
            tables.append(ideal_table(counts, args.ratio))
        if name == "levels":
            tables += [levels_table(counts, ratio, args.window) for ratio in args.ratio]
        if name == "budget":
            tables += [budget_table(counts, ratio, args.window) for ratio in args.ratio]
        if name == "cards":
            tables += [cards_table(counts, ratio, args.window) for ratio in args.ratio]
    return tables


@cache
def _count(name: str, size: int, batch: int | None) -> Count:
    return count(MODELS[name], size, batch)


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--table", nargs="+", choices=TABLES, default=list(TABLES), help="(all)")
    add("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="(all)")
    add(
        "--size",
        type=number(int, STEP, 8192),
        nargs="+",
        default=[512, 768, 1024, 2048],
        help="pixels, square (512 768 1024 2048)",
    )
    add(
        "--ratio",
        type=number(float, 0, 0.9375),
        nargs="+",
        default=[0.5],
        help="share of the tokens that merge, into one per cell of 2×2, or 4×4 above 0.75 (0.5)",
    )
    add("--batch", type=number(int, 1, 1024), help="(of one image: 2 with guidance, 1 for Flux)")
    add(
        "--window",
        type=number(int, 1, 8192),
        default=WINDOW,
        help="side of a matching window, in tokens (%(default)s)",
    )


main = Command("cost", add_options, prepare, run)
