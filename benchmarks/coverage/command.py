"""The command of scripts/coverage.py: which models merge, counted."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common.arguments import Command
from benchmarks.common.device import cpu_name
from benchmarks.common.files import versions, write_json
from benchmarks.coverage.models import HOSTS, table


def prepare(args: Namespace) -> Namespace:
    return args


def run(args: Namespace) -> None:
    found = [each for host in args.host for each in HOSTS[host]()]
    if args.reasons:
        for each in found:
            print(f"{each.host}.{each.name}: {each.merges or each.why}")
    print(table(found))
    if args.output:
        record = {
            "command": args.command,
            "environment": {
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
                **versions("torch", "transformers", "timm"),
            },
            "rows": [asdict(each) for each in found],
        }
        write_json(args.output, record)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--host", nargs="+", choices=HOSTS, default=list(HOSTS), help="hosts to go through (all)"
    )
    parser.add_argument(
        "--reasons", action="store_true", help="also print each model, and why it does not merge"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for all of them (none)")


main = Command("coverage", add_options, prepare, run)
