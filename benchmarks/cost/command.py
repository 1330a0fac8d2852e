"""What token merging saves and costs, from shapes alone: python scripts/cost.py --model sd15

Prints Markdown tables: the work at each level (levels), what a forward spends it on (shares), how
many times as fast merging is at best (ideal), and what it may cost for that (budget). Nothing is
computed but shapes, so that any machine gives the same tables. See docs/performance.md.
"""

import argparse

from benchmarks.common.arguments import number, run_script
from benchmarks.cost.tables import (
    MODELS,
    STEP,
    budget_table,
    count,
    ideal_table,
    levels_table,
    shares_table,
)
from tomesd.core.workload import WINDOW

TABLES = ("levels", "shares", "ideal", "budget")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    for size in args.size:
        if size % STEP:
            parser.error(f"--size must be a multiple of {STEP}, got {size}")
    counts = [count(MODELS[name], size, args.batch) for name in args.model for size in args.size]
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
    print("\n\n".join(tables))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--size",
        type=number(int, STEP, 8192),
        nargs="+",
        default=[512, 768, 1024, 2048],
        help="pixels, square",
    )
    parser.add_argument(
        "--ratio",
        type=number(float, 0, 0.9375),
        nargs="+",
        default=[0.5],
        help="share of the tokens that merge, into one in each cell of 2×2, or 4×4 above 0.75",
    )
    parser.add_argument(
        "--batch",
        type=number(int, 1, 1024),
        help="default: that of one picture, 2 where guidance doubles it and 1 for Flux",
    )
    parser.add_argument(
        "--window",
        type=number(int, 1, 8192),
        default=WINDOW,
        help="tokens along a side of the windows that matches are looked for in",
    )
    return parser


if __name__ == "__main__":
    run_script(main)
