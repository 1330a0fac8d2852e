"""Training the Shapes classifier with token merging, and its accuracy with another r."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tomesd
from benchmarks.classifier.data import LabelledData, accuracy
from benchmarks.common import markdown
from benchmarks.common.files import read_json, write_json
from benchmarks.common.timing import interleave, round_ratio, seconds
from benchmarks.training import architectures
from benchmarks.training.data import LabelledPictures
from benchmarks.training.loop import Stage, make_optimizer, train, update
from benchmarks.training.losses import MaskedClassifier, classifier_loss
from tomesd.pictures.classifiers import load_classifier
from tomesd.shapes import pipeline as shapes

UNTRAINED = "off the shelf"


@dataclass(frozen=True)
class TrainingSetup:
    """What all models have in common: only r differs.

    >>> setup = TrainingSetup(Stage("", 300, batch=32, lr=5e-5), data)

    from_scratch: whether training starts with random weights; otherwise with those of the embedded
        classifier. The head for masks (see `MaskedClassifier`) is new in either case.
    """

    stage: Stage
    data: LabelledPictures
    from_scratch: bool = False

    @property
    def device(self) -> torch.device:
        return self.data.labels.device

    def initial_model(self) -> MaskedClassifier:
        """The model before training, with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (
                architectures.build_classifier() if self.from_scratch else shapes.load_classifier()
            )
            return MaskedClassifier(model).to(self.device)

    def loss(self, model: MaskedClassifier, generator: torch.Generator) -> Tensor:
        return classifier_loss(model, self.data, self.stage.batch, generator)

    def train(self, r: int, checkpoint: Path) -> MaskedClassifier:
        """A model trained while r tokens merge in each layer; the patch is removed.

        >>> setup.train(16, Path("runs/r16.pt"))

        Resumes an existing checkpoint.
        """
        model = self.initial_model()
        with tomesd.patched(model, r=r):
            stage = replace(self.stage, name=f"training with r = {r}")
            train(stage, model, partial(self.loss, model), checkpoint)
        return model

    def step_seconds(self, values: Sequence[int], rounds: int) -> dict[str, list[float]]:
        """Seconds of a training step with each r, in interleaved rounds."""
        runs = {str(r): partial(seconds, self._step(r), self.device) for r in values}
        interleave(runs, 1)  # Warm up.
        with tqdm(total=rounds * len(runs), desc="timing", unit="step", mininterval=1) as bar:
            return interleave(runs, rounds, bar.update)

    def _step(self, r: int) -> Callable[[], None]:
        model = tomesd.apply_patch(self.initial_model(), r=r)
        optimizer, generator = make_optimizer(self.stage, model), torch.Generator()
        return lambda: update(optimizer, self.loss(model, generator))


def train_and_measure(
    setup: TrainingSetup,
    values: Sequence[int],
    data: LabelledData,
    rounds: int,
    batch: int,
    folder: Path,
) -> dict[str, Any]:
    """Train with each r and measure the accuracy with each r.

    >>> results = train_and_measure(setup, [0, 16], shapes_data(1000), 7, 32, Path("runs"))

    Results in the folder's results.json are kept and not measured again.
    Returns {"seconds": {r: of a step, in each round}, "accuracy": {trained: {r: share}}}; r is
    text there, and the model without training is called "off the shelf".
    """
    file = folder / "results.json"
    results = read_json(file) or {"seconds": {}, "accuracy": {}}
    # Interleaved, so all of them or none.
    if not {str(r) for r in values} <= results["seconds"].keys():
        results["seconds"] = setup.step_seconds(values, rounds)
        write_json(file, results)
    for r in (*([] if setup.from_scratch else [None]), *values):
        measured = results["accuracy"].setdefault(UNTRAINED if r is None else str(r), {})
        missing = [other for other in values if str(other) not in measured]
        if not missing:
            continue
        model = setup.initial_model() if r is None else setup.train(r, folder / f"r-{r}.pt")
        classifier = replace(load_classifier(), model=model.classifier.eval())
        for other in tqdm(missing, desc="accuracy", unit="r"):
            with torch.no_grad(), tomesd.patched(classifier.model, r=other):
                measured[str(other)] = accuracy(classifier, data, model.mask_head.weight, batch)
            write_json(file, results)
    return results


def table(results: dict[str, Any], values: Sequence[int], steps_per_epoch: float) -> str:
    """Markdown: a row for each model, a column for each r that its accuracy is measured with.

    >>> print(table(results, [0, 16], steps_per_epoch=512))
    | trained with | s per epoch | times as fast | accuracy with r = 0, % | ...
    """
    times, base = results["seconds"], results["seconds"][str(values[0])]
    rows = []
    for trained in (UNTRAINED, *map(str, values)):
        if trained not in results["accuracy"]:
            continue
        cells = [markdown.MISSING, markdown.MISSING]
        if trained in times:
            speedup = vars(round_ratio(base, times[trained]))
            epoch = statistics.median(times[trained]) * steps_per_epoch
            cells = [f"{epoch:.0f}", markdown.spread(speedup, 2)]
        cells += [f"{100 * results['accuracy'][trained][str(r)]:.1f}" for r in values]
        rows.append([trained if trained == UNTRAINED else f"r = {trained}", *cells])
    accuracies = [f"accuracy with r = {r}, %" for r in values]
    return markdown.table(["trained with", "s per epoch", "times as fast", *accuracies], rows)
