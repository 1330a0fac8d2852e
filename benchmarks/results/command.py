"""The command of scripts/tables.py: write, check, list or collect."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from benchmarks.common.arguments import Command
from benchmarks.results.files import RESULTS, ROOT, collect
from benchmarks.results.regions import drifted, rewrite
from benchmarks.results.tables import NAMES, source


def prepare(args: Namespace) -> Namespace:
    return args


def run(args: Namespace) -> None:
    if args.list:
        for name in NAMES:
            print(f"{name}: {source(name)}")
    elif args.collect:
        name, output = args.collect
        print(collect(name, Path(output)).relative_to(ROOT))
    elif args.check:
        found = [f"{document.relative_to(ROOT)}: {name}" for document, name in drifted()]
        if found:
            tables = "\n".join(found)
            print(f"python scripts/tables.py would change:\n{tables}", file=sys.stderr)
            sys.exit(1)
    else:
        for document, name in rewrite():
            print(f"{document.relative_to(ROOT)}: {name}")


def add_options(parser: ArgumentParser) -> None:
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="change nothing; status 1 if it would")
    only.add_argument("--list", action="store_true", help="print the names of all tables")
    only.add_argument(
        "--collect",
        nargs=2,
        metavar=("NAME", "OUTPUT"),
        help=f"copy a run's results.json or results.csv into results/: {', '.join(RESULTS)}",
    )


main = Command("tables", add_options, prepare, run, failures=(ValueError, OSError))
