"""The command of scripts/gpu.py: parts in the order of their worth, written as they finish."""

import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import Command, number
from benchmarks.common.device import choose_device, device_name
from benchmarks.common.files import check_file, read_json, write_json
from benchmarks.common.memory import first_line
from benchmarks.gpu import attention, compiled, cost, forwards, limits, rates, right, vits
from benchmarks.gpu.context import Case, Context, Part

PARTS = {
    part.name: part
    for part in (
        Part("right", right.cases),
        Part("cost", cost.cases),
        Part("rates", rates.cases),
        Part("forwards", forwards.cases),
        Part("attention", attention.cases),
        Part("vits", vits.cases),
        Part("limits", limits.cases),
        Part("compiled", compiled.cases),
    )
}


@dataclass(frozen=True)
class Job:
    context: Context
    parts: list[Part]
    output: Path
    minutes: float
    command: str
    record: dict[str, Any]


def prepare(args: Namespace) -> Job:
    device = choose_device(args.device)
    context = Context(device, args.quick, find_peers(args.peer_path))
    default = Path("runs" if args.quick else "results") / f"{_slug(device_name(device))}.json"
    output = args.output or default
    check_file(output)
    environment = context.environment()
    record = read_json(output) or {}
    if record and record.get("environment") != environment:
        raise ValueError(
            f"output must be of this device and these versions to go on with, got {output}: move "
            "it away, or choose another --output"
        )
    record = {"suite": "gpu", "environment": environment, "parts": {}} | record
    parts = [PARTS[name] for name in args.part or PARTS]
    return Job(context, parts, output, args.minutes, args.command, record)


def find_peers(folders: Iterable[Path]) -> dict[str, Path]:
    """Where the packages tomesd (0.1.3) and tome are, in these folders or right below them.

    Raises FileNotFoundError for a folder with neither.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        places = [folder, *sorted(folder.glob("*/"))]
        here = {
            name: place
            for place in reversed(places)
            for name in ("tomesd", "tome")
            if (place / name / "__init__.py").is_file()
        }
        if not here:
            raise FileNotFoundError(
                f"peer-path must be a folder with the package tomesd or tome, got {str(folder)!r}"
            )
        found |= here
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(job: Job) -> None:
    """Run the cases that have not run yet, as long as there is time.

    Raises OSError after an error that leaves the device useless to this process.
    """
    end = time.monotonic() + 60 * job.minutes
    left_out = 0
    print(f"{job.record['environment']['device']}, {job.output}", flush=True)
    for part in job.parts:
        done = job.record["parts"].setdefault(part.name, {})
        for case in part.cases(job.context):
            if case.name in done:
                continue
            if time.monotonic() + case.seconds > end:
                left_out += 1
                continue
            started = time.monotonic()
            done[case.name] = run_case(case)
            job.context.free()
            job.record["command"] = job.command
            write_json(job.output, job.record)
            if "CUDA error" in done[case.name].get("error", ""):
                raise OSError(f"{part.name}: {case.name}: {done[case.name]['error']}")
            taken = time.monotonic() - started
            print(
                f"[{taken:5.1f} s] {part.name}: {case.name}: {summary(done[case.name])}", flush=True
            )
    if left_out:
        print(f"{left_out} cases are left for lack of time: the same command goes on with them")


def run_case(case: Case) -> dict[str, Any]:
    """What was measured, or the error: the other cases are worth running all the same."""
    try:
        return case.run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def summary(row: dict[str, Any]) -> str:
    """A row in one line."""
    text = str(_short(row))
    return text if len(text) <= 1000 else f"{text[:1000]} …"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"median", "low", "high"}:
            return _short(value["median"])
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), help="(all, in this order)")
    add(
        "--minutes",
        type=number(float, 0, 10_000),
        default=9,
        help="no case starts that would probably end later (%(default)s)",
    )
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--quick", action="store_true", help="tiny models, to try that everything runs")
    add(
        "--peer-path",
        type=Path,
        nargs="+",
        default=[],
        help="folders with the packages of tomesd==0.1.3 and facebookresearch/ToMe, unpacked "
        "(none: they are left out)",
    )
    add("--output", type=Path, help="a JSON file (results/<device>.json, quick: runs/)")


main = Command("gpu", add_options, prepare, run, resumes=True)
