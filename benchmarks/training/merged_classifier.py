"""Training the Shapes classifier while tokens merge, and reading with another r afterwards."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tomesd
from benchmarks.classifier.classifiers import load_classifier
from benchmarks.classifier.measurements import Data, accuracy
from benchmarks.common.files import atomic_write
from benchmarks.common.timing import interleave, round_ratio, seconds
from benchmarks.training.loop import (
    LabelledPictures,
    MaskedClassifier,
    Stage,
    classifier_loss,
    make_optimizer,
    train,
    update,
)
from tomesd.shapes import pipeline as shapes

UNTRAINED = "off the shelf"


@dataclass(frozen=True)
class TrainingSetup:
    """What all models have in common: only r differs.

    from_scratch: whether they begin with random weights; otherwise with those of the embedded
        classifier. The head for masks (see `MaskedClassifier`) is new in either case.
    """

    stage: Stage
    data: LabelledPictures
    from_scratch: bool = False

    @property
    def device(self) -> torch.device:
        return self.data.labels.device

    def begin(self) -> MaskedClassifier:
        """The same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = shapes.build_classifier() if self.from_scratch else shapes.load_classifier()
            return MaskedClassifier(model).to(self.device)

    def loss(self, model: MaskedClassifier, generator: torch.Generator) -> Tensor:
        return classifier_loss(model, self.data, self.stage.batch, generator)

    def train(self, r: int, checkpoint: Path) -> MaskedClassifier:
        """A model that was trained with r tokens merging in each layer, without the patch.

        >>> course.train(16, Path("runs/r16.pt"))

        Goes on from the checkpoint if there is one.
        """
        model = self.begin()
        with tomesd.patched(model, r=r):
            stage = replace(self.stage, name=f"training with r = {r}")
            train(stage, model, partial(self.loss, model), checkpoint)
        return model

    def step_seconds(self, values: Sequence[int], rounds: int) -> dict[str, list[float]]:
        """How long a step of training takes with each r, in turns: by r, of each round."""
        runs = {str(r): partial(seconds, self._stepper(r), self.device) for r in values}
        interleave(runs, 1)  # First calls pay for memory that later ones find ready.
        with tqdm(total=rounds * len(runs), desc="timing", unit="step", mininterval=1) as bar:
            return interleave(runs, rounds, bar.update)

    def _stepper(self, r: int):
        model = tomesd.apply_patch(self.begin(), r=r)
        optimizer, generator = make_optimizer(self.stage, model), torch.Generator()
        return lambda: update(optimizer, self.loss(model, generator))


def run(
    course: TrainingSetup, values: Sequence[int], data: Data, rounds: int, batch: int, folder: Path
) -> dict[str, Any]:
    """Train with each r and read with each r; what the folder's results.json has is kept.

    >>> results = run(course, [0, 16], shapes_data(1000), rounds=7, batch=32, folder=Path("runs"))

    Returns {"seconds": {r: of a step, in each round}, "accuracy": {trained: {read: share}}}; r is
    text there, and the model that was not trained any further is called "off the shelf".
    """
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"seconds": {}, "accuracy": {}}

    def keep() -> None:
        with atomic_write(file) as partial_file:
            partial_file.write_text(json.dumps(results, indent=1) + "\n")

    # In turns, so all of them or none.
    if not {str(r) for r in values} <= results["seconds"].keys():
        results["seconds"] = course.step_seconds(values, rounds)
        keep()
    for r in (*([] if course.from_scratch else [None]), *values):
        read = results["accuracy"].setdefault(UNTRAINED if r is None else str(r), {})
        missing = [other for other in values if str(other) not in read]
        if not missing:
            continue
        model = course.begin() if r is None else course.train(r, folder / f"r-{r}.pt")
        classifier = replace(load_classifier(), model=model.classifier.eval())
        for other in tqdm(missing, desc="reading", unit="r"):
            with torch.no_grad(), tomesd.patched(classifier.model, r=other):
                read[str(other)] = accuracy(classifier, data, model.mask_head.weight, batch)
            keep()
    return results


def table(results: dict[str, Any], values: Sequence[int], steps_per_epoch: float) -> str:
    """Markdown: a line for each model, a column for each r that it is read with.

    >>> print(table(results, [0, 16], steps_per_epoch=512))
    """
    reads = " | ".join(f"read with r = {r}, %" for r in values)
    lines = [
        f"| trained with | s per epoch | times as fast | {reads} |",
        "|---|---|---|" + "---|" * len(values),
    ]
    times, base = results["seconds"], results["seconds"][str(values[0])]
    for trained in (UNTRAINED, *map(str, values)):
        if trained not in results["accuracy"]:
            continue
        cells = ["–", "–"]
        if trained in times:
            ratio = round_ratio(base, times[trained])
            cells = [
                f"{statistics.median(times[trained]) * steps_per_epoch:.0f}",
                f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
            ]
        cells += [f"{100 * results['accuracy'][trained][str(r)]:.1f}" for r in values]
        name = trained if trained == UNTRAINED else f"r = {trained}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
