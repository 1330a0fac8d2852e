"""The command of scripts/coverage.py: which models merge, counted."""

import hashlib
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

import torch

import tomesd
from benchmarks.common.arguments import Command
from benchmarks.common.files import check_folder, read_json, settings_folder, write_json
from benchmarks.coverage.models import HOSTS, Covered, cover_all, table
from tomesd.pictures.device import cpu_name
from tomesd.pictures.files import versions

_SECONDS_BETWEEN_SAVES = 10


def prepare(args: Namespace) -> Namespace:
    """The file of these hosts' models, as they are with this code."""
    check_folder(args.output)
    settings = {"hosts": args.host, "code": _code(), **versions("torch", "transformers", "timm")}
    args.file = settings_folder(args.output, settings) / "results.json"
    return args


def _code() -> str:
    """A hash of the library: other code may merge other models."""
    total = hashlib.sha256()
    for file in sorted(Path(tomesd.__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def run(args: Namespace) -> None:
    known = [Covered(**row) for row in (read_json(args.file) or {"rows": []})["rows"]]
    found: list[Covered] = []
    saved = time.monotonic()
    for each in cover_all(args.host, known):
        found.append(each)
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
            _save(args, found)
            saved = time.monotonic()
    _save(args, found)
    if args.reasons:
        for each in found:
            print(f"{each.host}.{each.name}: {each.merges or each.why}")
    print(table(found))
    print(args.file)


def _save(args: Namespace, found: list[Covered]) -> None:
    record = {
        "command": args.command,
        "environment": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            **versions("torch", "transformers", "timm"),
        },
        "rows": [asdict(each) for each in found],
    }
    write_json(args.file, record)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--host", nargs="+", choices=HOSTS, default=list(HOSTS), help="hosts to go through (all)"
    )
    parser.add_argument(
        "--reasons", action="store_true", help="also print each model, and why it does not merge"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/coverage"), help="(%(default)s)")


main = Command("coverage", add_options, prepare, run, resumes=True)
