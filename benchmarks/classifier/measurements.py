"""What merging does to a classifier: accuracy, throughput and multiply-adds of each experiment."""

import csv
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.classifier.data import LabelledData, accuracy
from benchmarks.classifier.experiments import Experiment
from benchmarks.classifier.matchers import merging
from benchmarks.common.timing import interleave, round_ratio, seconds
from tomesd.pictures.classifiers import Classifier
from tomesd.pictures.files import atomic_write

COLUMNS = (
    *("part", "name", "settings", "accuracy", "images", "images_per_second"),
    *("unpatched_images_per_second", "times_as_fast", "times_fewer_multiply_adds"),
)
Record = dict[str, Any]


def largest_r(model: Any) -> int:
    """The constant r with which about one token is left after the last layer.

    >>> largest_r(load_classifier("timm:vit_large_patch16_224", pretrained=False).model)
    8
    """
    with merging(model, {"r": 0}) as patch:
        return (patch.own_tokens - patch.prefix) // len(patch.points)


def measure(
    experiment: Experiment,
    classifier: Classifier,
    data: LabelledData | None,
    pixels: Tensor,
    rounds: int,
    batch: int,
) -> Record:
    """The results of one experiment.

    >>> measure(Experiment("sweep", "r = 8", {"r": 8}), classifier, data, pixels, 5, batch=32)

    data: None for no accuracy. pixels: the timed batch, in `rounds` rounds interleaved with the
    unpatched model.
    Throughput is that of the model alone, with the pixels on its device; "times as fast" is the
    median of the rounds' ratios. Multiply-adds are those of the blocks.
    """
    with merging(classifier.model, experiment.options) as patch:
        cost, n, prefix = patch.cost(), patch.own_tokens, patch.prefix
        merged = cost.of(patch.forward.schedule, n, prefix)
        fewer = cost.of([0] * len(patch.points), n, prefix) / merged
        record: Record = {"times_fewer_multiply_adds": fewer}
        if data is not None:
            record |= {"accuracy": accuracy(classifier, data, pixels, batch), "images": len(data)}
    if experiment.timed and rounds:
        record |= _throughput(experiment, classifier, pixels, rounds)
    return record


def _throughput(
    experiment: Experiment, classifier: Classifier, pixels: Tensor, rounds: int
) -> Record:
    def timed(options: dict[str, Any]) -> float:
        with merging(classifier.model, options):
            return seconds(partial(classifier.logits, pixels), pixels.device)

    runs = {"unpatched": partial(timed, {"r": 0}), "merged": partial(timed, experiment.options)}
    interleave(runs, 1)  # Warm up.
    times = interleave(runs, rounds)
    return {
        "images_per_second": len(pixels) / statistics.median(times["merged"]),
        "unpatched_images_per_second": len(pixels) / statistics.median(times["unpatched"]),
        "times_as_fast": round_ratio(times["unpatched"], times["merged"]).median,
    }


def measure_all(
    todo: Sequence[Experiment],
    file: Path,
    measure_one: Callable[[Experiment], Record],
    rounds: int,
) -> list[Record]:
    """Measure what the CSV file does not have yet; it is written after each experiment.

    >>> records = measure_all(todo, Path("results.csv"), measure_one, rounds=5)

    Experiments with the same options, in whatever part, are measured once.
    """
    earlier = read_records(file)
    known = {record["settings"]: record for record in earlier}
    with torch.no_grad(), tqdm(todo, unit="row") as bar:
        for experiment in bar:
            bar.set_postfix_str(f"{experiment.part}: {experiment.name}", refresh=False)
            found = known.get(experiment.key)
            is_untimed = found is not None and found.get("times_as_fast") is None
            if found is None or (experiment.timed and rounds and is_untimed):
                known[experiment.key] = {"settings": experiment.key, **measure_one(experiment)}
            _write_records(file, _records(todo, known), earlier)
    return _records(todo, known)


def _records(todo: Sequence[Experiment], known: dict[str, Record]) -> list[Record]:
    done = [each for each in todo if each.key in known]
    return [known[each.key] | {"part": each.part, "name": each.name} for each in done]


def _write_records(file: Path, records: list[Record], earlier: list[Record]) -> None:
    """The records, followed by those of earlier runs with other parts or values."""

    def identity(record: Record) -> tuple[str, str, str]:
        return record["part"], record["name"], record["settings"]

    written = {identity(record) for record in records}
    kept = [record for record in earlier if identity(record) not in written]
    with atomic_write(file) as partial_file, partial_file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(records + kept)


def read_records(file: Path) -> list[Record]:
    """The records of a CSV file; none if there is no file.

    >>> read_records(Path("runs/classify/results.csv"))[0]["name"]
    'r = 0'

    Raises ValueError if it is another file.
    """
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file} must be a table of scripts/classify.py; move it away")
        found = []
        for line in reader:
            numbers: Record = {k: float(line[k]) if line[k] else None for k in COLUMNS[3:]}
            numbers["images"] = int(float(line["images"])) if line["images"] else None
            found.append({**line, **numbers})
        return found
