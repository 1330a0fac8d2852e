"""What merging does to a classifier: accuracy, throughput and multiply-adds, row by row."""

import csv
import json
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import tomesd
from benchmarks.classifier.classifiers import Classifier
from benchmarks.common.files import atomic_write
from benchmarks.common.timing import interleave, round_ratio, seconds
from benchmarks.quality.cases import held_out
from tomesd.api import _PATCH, _patched
from tomesd.shapes.pipeline import LABELS
from tomesd.shapes.world import draw
from tomesd.vit import schedule
from tomesd.vit.patch import ViTPatch

PARTS = ("sweep", "ablation", "algorithms", "schedules")

# ToMe, Table 1: a choice, and the settings that differ from the defaults.
ABLATION: dict[str, dict[str, Any]] = {
    "default: K, cosine, mean, weighted, alternating": {},
    "features: block input": {"features": "x_pre"},
    "features: after attention": {"features": "x"},
    "features: Q": {"features": "q"},
    "features: V": {"features": "v"},
    "distance: Euclidean": {"distance": "euclidean"},
    "distance: dot": {"distance": "dot"},
    "distance: softmax": {"distance": "softmax"},
    "heads: concatenate": {"heads": "concatenate"},
    "combine: keep one": {"combine": "head"},
    "combine: max": {"combine": "max"},
    "combine: average": {"combine": "mean"},
    "partition: sequential": {"partition": "sequential"},
    "partition: random": {"partition": "random"},
    "proportional attention: off": {"prop_attn": False},
}

# ToMe, Table 2, and PiToMe's energy score beside it.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "prune random": {"method": "prune_random"},
    "prune by attention": {"method": "prune_attention"},
    "k-means, 2 iterations": {"method": "kmeans"},
    "k-means, 5 iterations": {"method": "kmeans", "kmeans_iterations": 5},
    "greedy matching": {"method": "greedy"},
    "bipartite matching": {},
    "PiToMe": {"method": "energy"},
}

COLUMNS = (
    *("part", "name", "settings", "accuracy", "images", "images_per_second"),
    *("unpatched_images_per_second", "times_as_fast", "times_fewer_multiply_adds"),
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to merge. settings: for apply_patch; r=0 merges nothing."""

    part: str
    name: str
    settings: dict[str, Any]
    timed: bool = True

    @property
    def key(self) -> str:
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Data:
    """Labelled pictures. load: by index. labels: int64 [n, groups]; groups: how many of the logits
    decide each of them."""

    name: str
    load: Callable[[int], Image.Image]
    labels: Tensor
    groups: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def right(self, logits: Tensor, indices: slice) -> int:
        """For how many pictures every label is right."""
        parts = logits.split(self.groups, dim=1)
        best = torch.stack([part.argmax(1) for part in parts], 1)
        return int((best.cpu() == self.labels[indices]).all(1).sum())


def shapes_data(count: int) -> Data:
    """Pictures of the Shapes world that no model was trained on; right is who gets all four labels.

    >>> len(shapes_data(100))
    100
    """
    scenes = held_out(count)
    pictures = [draw(scene) for scene in tqdm(scenes, desc="drawing", mininterval=1)]
    labels = torch.tensor([scene.labels for scene in scenes])
    return Data("shapes", pictures.__getitem__, labels, [len(names) for names in LABELS.values()])


def folder_data(folder: Path, count: int) -> Data:
    """Pictures in one folder for each class, in the order of the model's logits.

    >>> data = folder_data(Path("imagenet/val"), 5000)

    count: at most so many, evenly spaced, so that classes stay balanced.
    Raises FileNotFoundError if there are no such folders or a class has no pictures.
    """
    from torchvision.datasets import ImageFolder

    found = ImageFolder(str(folder))
    samples = found.samples
    count = min(count, len(samples))
    chosen = [samples[i * len(samples) // count] for i in range(count)]
    labels = torch.tensor([[label] for _, label in chosen])
    return Data(str(folder), lambda i: Image.open(chosen[i][0]), labels, [len(found.classes)])


def vit_patch(model: Any) -> ViTPatch:
    """The patch of a patched classifier, which knows its layers and tokens."""
    (target,) = _patched(model).values()
    return getattr(target, _PATCH)


def largest_r(model: Any) -> int:
    """The constant r with which about one token is left after the last layer.

    >>> largest_r(load_classifier("timm:vit_large_patch16_224", pretrained=False).model)
    8
    """
    with tomesd.patched(model, r=0):
        patch = vit_patch(model)
        return (patch.own_tokens - patch.prefix) // len(patch.seams)


def rows(
    parts: Iterable[str], values: Sequence[int], r: int, layers: int, schedules: int
) -> list[Row]:
    """All rows of these parts.

    >>> [row.name for row in rows(["sweep"], [0, 8], 8, 12, 0)]
    ['r = 0', 'r = 8']

    values: r in the sweep. r: in the ablation and for the algorithms. schedules: how many random
        ones, of between a quarter and all of the largest value's tokens.
    """
    found = []
    if "sweep" in parts:
        found += [Row("sweep", f"r = {value}", {"r": value}) for value in values]
    if "ablation" in parts:
        found += [Row("ablation", name, {"r": r} | how) for name, how in ABLATION.items()]
    if "algorithms" in parts:
        found += [Row("algorithms", name, {"r": r} | how) for name, how in ALGORITHMS.items()]
    if "schedules" in parts:
        for value in values:
            found.append(Row("schedules", f"constant {value}", {"r": value}, timed=False))
            found.append(
                Row("schedules", f"decreasing {value}", {"r": [*_line(value, layers)]}, False)
            )
        generator = random.Random(0)
        for index in range(schedules):
            total = round(layers * max(values) * generator.uniform(0.25, 1))
            shares = [generator.expovariate(1) for _ in range(layers)]
            drawn = [round(total * share / sum(shares)) for share in shares]
            found.append(Row("schedules", f"random {index}", {"r": drawn}, timed=False))
    return found


def _line(r: int, layers: int) -> list[int]:
    return schedule.per_layer((r, -1), layers)


def measure(
    row: Row, classifier: Classifier, data: Data | None, pixels: Tensor, rounds: int, batch: int
) -> Record:
    """One row's figures.

    >>> measure(Row("sweep", "r = 8", {"r": 8}), classifier, data, pixels, rounds=5, batch=32)

    data: None for no accuracy. pixels: what is timed, in `rounds` turns with the unpatched model.
    Throughput counts the model alone, with the pixels on its device; "times as fast" is the median
    of the rounds' ratios. Multiply-adds are those of the blocks.
    """
    model = classifier.model
    with tomesd.patched(model, **row.settings):
        patch = vit_patch(model)
        cost, n, prefix = patch.cost(), patch.own_tokens, patch.prefix
        merged = cost.of(patch.run.schedule, n, prefix)
        fewer = cost.of([0] * len(patch.seams), n, prefix) / merged
        record: Record = {"times_fewer_multiply_adds": fewer}
        if data is not None:
            record |= {"accuracy": accuracy(classifier, data, pixels, batch), "images": len(data)}
    if row.timed and rounds:

        def timed(settings: dict[str, Any]) -> float:
            with tomesd.patched(model, **settings):
                return seconds(partial(classifier.logits, pixels), pixels.device)

        runs = {"unpatched": partial(timed, {"r": 0}), "row": partial(timed, row.settings)}
        interleave(runs, 1)  # First calls pay for memory that later ones find ready.
        taken = interleave(runs, rounds)
        record["images_per_second"] = len(pixels) / statistics.median(taken["row"])
        record["unpatched_images_per_second"] = len(pixels) / statistics.median(taken["unpatched"])
        record["times_as_fast"] = round_ratio(taken["unpatched"], taken["row"]).median
    return record


def accuracy(classifier: Classifier, data: Data, like: Tensor, batch: int) -> float:
    """The share of the pictures for which every label is right.

    >>> accuracy(load_classifier(), shapes_data(100), torch.zeros(()), batch=32)

    like: a tensor of the model's device and precision.
    """
    right = 0
    for start in range(0, len(data), batch):
        part = range(start, min(start + batch, len(data)))
        images = [classifier.fit(data.load(i)) for i in part]
        logits = classifier.logits(classifier.prepare(images).to(like))
        right += data.right(logits, slice(part.start, part.stop))
    return right / len(data)


def run(
    todo: Sequence[Row], file: Path, measured: Callable[[Row], Record], rounds: int
) -> list[Record]:
    """Measure what the CSV file does not have yet; it is written whole after each row.

    >>> records = run(rows(["sweep"], [0, 8], 8, 12, 0), Path("out.csv"), measured, rounds=5)

    Rows of the same settings, in whatever part, are measured once.
    """
    before = read(file)
    known = {record["settings"]: record for record in before}
    with torch.no_grad(), tqdm(todo, unit="row") as bar:
        for row in bar:
            bar.set_postfix_str(f"{row.part}: {row.name}", refresh=False)
            there = known.get(row.key)
            if there is None or (row.timed and rounds and there.get("times_as_fast") is None):
                known[row.key] = {"settings": row.key, **measured(row)}
            _write(file, _records(todo, known), before)
    return _records(todo, known)


def _records(todo: Sequence[Row], known: dict[str, Record]) -> list[Record]:
    done = [row for row in todo if row.key in known]
    return [known[row.key] | {"part": row.part, "name": row.name} for row in done]


def _write(file: Path, records: list[Record], before: list[Record]) -> None:
    """The records, and behind them what earlier runs with other parts or values left."""

    def identity(record: Record) -> tuple:
        return record["part"], record["name"], record["settings"]

    written = {identity(record) for record in records}
    kept = [record for record in before if identity(record) not in written]
    with atomic_write(file) as partial_file, partial_file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(records + kept)


def read(file: Path) -> list[Record]:
    """The records of a CSV file, none if there is no file.

    Raises ValueError if it is no such file.
    """
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file} is not a table of scripts/classify.py; move it away")
        found = []
        for line in reader:
            numbers: Record = {k: float(line[k]) if line[k] else None for k in COLUMNS[3:]}
            numbers["images"] = int(float(line["images"])) if line["images"] else None
            found.append({**line, **numbers})
        return found
