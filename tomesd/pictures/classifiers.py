"""Vision Transformers that classify pictures: the embedded one, or any other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tomesd.shapes import names
from tomesd.shapes import pipeline as shapes

LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True)
class Classifier:
    """A model with its preprocessing.

    >>> classifier = load_classifier()
    >>> logits = classifier.logits(classifier.prepare(pictures))

    sides: height and width of the input. fit: crops and scales a picture to it, in RGB.
    prepare: stacks such pictures into one batch of pixels.
    """

    name: str
    model: Any
    sides: Sequence[int]
    fit: Callable[[Image.Image], Image.Image]
    prepare: Callable[[Sequence[Image.Image]], Tensor]

    def logits(self, pixels: Tensor) -> Tensor:
        found = self.model(pixels)
        return found if isinstance(found, Tensor) else found.logits


def check_model(model: str | None) -> None:
    """Check a model's name without loading anything.

    >>> check_model("timm:vit_base_patch16_224")

    Raises FileNotFoundError if the embedded classifier is missing, and ValueError for a folder
    without a configuration or a name that timm or torchvision do not know.
    """
    if model is None:
        folder = names.ASSETS / "classifier"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing; `python scripts/train_shapes.py --output assets` makes it"
            )
        return
    library, _, name = model.partition(":")
    if library in LIBRARIES and name:
        if name not in _names(library):
            raise ValueError(f"model must be one that {library} knows, got {model!r}")
    elif not (Path(model) / "config.json").is_file():
        raise ValueError(
            "model must be timm:<name>, torchvision:<name> or a folder in transformers' format, "
            f"got {model!r}"
        )


def _names(library: str) -> list[str]:
    if library == "timm":
        import timm

        names: list[str] = timm.list_models() + timm.list_models(pretrained=True)
        return names
    from torchvision import models

    return list(models.list_models(module=models))


def load_classifier(model: str | None = None, pretrained: bool = True) -> Classifier:
    """A classifier in evaluation mode, on the CPU.

    >>> load_classifier("timm:vit_base_patch16_224.augreg2_in21k_ft_in1k")

    model: None for the embedded one of the Shapes world, "timm:<name>", "torchvision:<name>" or a
        folder in transformers' format. pretrained: False leaves the weights of timm's and
        torchvision's models random, and downloads nothing.
    Raises as `check_model` does.
    """
    check_model(model)
    library, _, name = (model or "").partition(":")
    if model is None:
        found: Any = shapes.load_classifier()
        return _classifier("embedded", found, _image_size(found.config), 0.5, 0.5)
    if library == "timm":
        import timm

        found = timm.create_model(name, pretrained=pretrained).eval()
        data = timm.data.resolve_model_data_config(found)
        mean, std = data["mean"], data["std"]
        sides = data["input_size"][1:]
        return _classifier(model, found, sides, mean, std, data["crop_pct"])
    if library == "torchvision":
        from torchvision import models

        weights = models.get_model_weights(name).DEFAULT
        found = models.get_model(name, weights=weights if pretrained else None).eval()
        how = weights.transforms()
        (crop,), (resize,) = how.crop_size, how.resize_size
        return _classifier(model, found, (crop, crop), how.mean, how.std, crop / resize)
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    found = AutoModelForImageClassification.from_pretrained(model, local_files_only=True).eval()
    mean = std = 0.5
    if (Path(model) / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        mean, std = processor.image_mean, processor.image_std
    return _classifier(Path(model).name, found, _image_size(found.config), mean, std)


def _image_size(config: Any) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _classifier(
    name: str, model: Any, sides: Sequence[int], mean: Any, std: Any, crop: float = 1.0
) -> Classifier:
    """crop: the share of a picture, in each direction, that is cropped from its centre."""
    height, width = sides
    mean, std = (
        torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std)
    )

    def fit(image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        scale = max(width / image.width, height / image.height) / crop
        # In source pixels, so that resizing happens once.
        w, h = width / scale, height / scale
        left, top = (image.width - w) / 2, (image.height - h) / 2
        box = (left, top, left + w, top + h)
        return image.resize((width, height), Image.Resampling.BICUBIC, box)

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        scaled: Tensor = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return scaled

    return Classifier(name, model, sides, fit, prepare)
