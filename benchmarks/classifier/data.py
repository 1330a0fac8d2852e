"""Labelled pictures to classify, and the accuracy on them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.pictures.prompts import held_out
from tomesd.pictures.classifiers import Classifier
from tomesd.shapes.pipeline import LABELS
from tomesd.shapes.world import draw


@dataclass(frozen=True)
class LabelledData:
    """Labelled pictures.

    load: the picture of an index. labels: int64 [n, groups]. groups: the number of logits of each
    label.
    """

    name: str
    load: Callable[[int], Image.Image]
    labels: Tensor
    groups: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def correct(self, logits: Tensor, indices: slice) -> int:
        """The number of pictures for which all labels are predicted correctly."""
        parts = logits.split(self.groups, dim=1)
        best = torch.stack([part.argmax(1) for part in parts], 1)
        return int((best.cpu() == self.labels[indices]).all(1).sum())


def shapes_data(count: int) -> LabelledData:
    """Pictures of the Shapes world that no model was trained on, with four labels each.

    >>> len(shapes_data(100))
    100
    """
    scenes = held_out(count)
    pictures = [draw(scene) for scene in tqdm(scenes, desc="drawing", mininterval=1)]
    labels = torch.tensor([scene.labels for scene in scenes])
    groups = [len(names) for names in LABELS.values()]
    return LabelledData("shapes", pictures.__getitem__, labels, groups)


def folder_data(folder: Path, count: int) -> LabelledData:
    """Pictures in a folder for each class, in the order of the model's logits.

    >>> data = folder_data(Path("imagenet/val"), 5000)

    count: at most this many, evenly spaced, so that classes stay balanced.
    Raises FileNotFoundError if there are no such folders or a class has no pictures.
    """
    from torchvision.datasets import ImageFolder

    found = ImageFolder(str(folder))
    samples = found.samples
    count = min(count, len(samples))
    chosen = [samples[i * len(samples) // count] for i in range(count)]
    labels = torch.tensor([[label] for _, label in chosen])
    return LabelledData(
        str(folder), lambda i: Image.open(chosen[i][0]), labels, [len(found.classes)]
    )


def accuracy(classifier: Classifier, data: LabelledData, like: Tensor, batch: int) -> float:
    """The share of the pictures for which all labels are predicted correctly.

    >>> accuracy(load_classifier(), shapes_data(100), torch.zeros(()), batch=32)
    0.97

    like: a tensor on the model's device and of its precision.
    """
    correct = 0
    for start in range(0, len(data), batch):
        part = range(start, min(start + batch, len(data)))
        images = [classifier.fit(data.load(i)) for i in part]
        logits = classifier.logits(classifier.prepare(images).to(like))
        correct += data.correct(logits, slice(part.start, part.stop))
    return correct / len(data)
