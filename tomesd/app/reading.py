"""What the playground's classifier sees in a picture. Knows no page."""

from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from PIL import Image

import tomesd
from tomesd.app.loading import LOADING
from tomesd.pictures.classifiers import Classifier, load_classifier
from tomesd.pictures.files import open_image
from tomesd.pictures.token_pages import enlarged
from tomesd.shapes import world
from tomesd.shapes.pipeline import LABELS, split_logits
from tomesd.visualize import draw_groups

MOST_R = 48
LAYERS = 12
# Of an uploaded file; it is scaled down to what the classifier takes.
MOST_PIXELS = 50_000_000


@dataclass(frozen=True)
class Reading:
    """A picture as the classifier took it, its merged patches, and how sure it is of each label.

    tokens: how many are left after the layer, the class token included.
    """

    picture: Image.Image
    groups: Image.Image
    tokens: int
    found: dict[str, dict[str, float]]

    @property
    def sentence(self) -> str:
        """What the picture shows, as a prompt says it."""
        best = {name: max(each, key=lambda label: each[label]) for name, each in self.found.items()}
        return "a {color} {shape} on a {ground} {kind} background".format(**best)


class Reader:
    """The embedded classifier.

    >>> reader = Reader()
    >>> reader.read(example(3), r=8, layer=12).sentence
    'a ... on a ... background'
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._classifier: Classifier | None = None

    def read(self, picture: Image.Image, r: int, layer: int) -> Reading:
        """layer: after which the merged patches are drawn, from 1 to LAYERS."""
        with self._lock, torch.no_grad():
            classifier = self._load()
            picture = classifier.fit(picture)
            tomesd.apply_patch(classifier.model, r=max(r, 1))
            with tomesd.trace(classifier.model) as traced:
                if r == 0:
                    tomesd.remove_patch(classifier.model)
                logits = classifier.logits(classifier.prepare([picture]))
        large = enlarged(picture, (16, 16)).resize((384, 384), Image.Resampling.NEAREST)
        found = {
            name: dict(zip(LABELS[name], part[0].softmax(-1).tolist(), strict=True))
            for name, part in split_logits(logits).items()
        }
        if not traced:
            return Reading(large, large, 257, found)
        record = traced[layer - 1]
        return Reading(
            large, draw_groups(large, record.patches[0]), int(record.group.unique().numel()), found
        )

    def _load(self) -> Classifier:
        if self._classifier is None:
            with LOADING:
                self._classifier = load_classifier()
        return self._classifier


def example(seed: int) -> Image.Image:
    """A picture of the Shapes world that the classifier was not trained on.

    >>> example(0).size
    (128, 128)
    """
    return world.draw(world.scene(world.HELD_OUT[seed % len(world.HELD_OUT)]))


def open_upload(path: str) -> Image.Image:
    """An uploaded picture, of which only pixels are read.

    Raises ValueError for what is no PNG, JPEG or WebP, or too large.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"Images may have at most {MOST_PIXELS // 1_000_000} megapixels.")
    except OSError as error:
        raise ValueError("This file is not a PNG, JPEG or WebP image.") from error
    return open_image(Path(path))
