"""The models of the Shapes world: a small, real Stable Diffusion pipeline and a ViT classifier."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import (
    ViTForImageClassification,
)

from tomesd.shapes.world import COLORS, KINDS, SHAPES

# In a wheel they are installed beside this file; in a clone they stay at its top level.
_INSTALLED, _IN_CLONE = (Path(__file__).resolve().parents[up] / "assets" for up in (0, 2))
ASSETS = _INSTALLED if _INSTALLED.exists() else _IN_CLONE

# The classifier has one group of logits for each thing that it reads off a picture.
LABELS = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "kind": KINDS,
    "ground": tuple(COLORS),
}


def load_pipeline(
    folder: Path = ASSETS / "pipeline", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The embedded Stable Diffusion of the Shapes world, 128×128 px.

    >>> load_pipeline()("a photo of a red heart on a blue striped background").images[0].size
    (128, 128)

    Raises FileNotFoundError if it is not there.
    """
    _require(folder)
    return StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)


def load_classifier(folder: Path = ASSETS / "classifier") -> ViTForImageClassification:
    """The embedded ViT that says what a picture of the Shapes world shows (see `read`)."""
    _require(folder)
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def _require(folder: Path) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"folder must hold a model, got {folder}, which does not exist: reinstall tomesd, or, "
            "in a clone, python scripts/train_shapes.py --output assets"
        )


def split_logits(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The classifier's logits [B, 28], one tensor for each of shape, color, kind and ground."""
    parts = logits.split([len(names) for names in LABELS.values()], dim=-1)
    return dict(zip(LABELS, parts, strict=True))


def read(logits: torch.Tensor) -> list[tuple[int, ...]]:
    """What each picture shows, as `Scene.labels` gives it, from the classifier's logits [B, 28]."""
    best = [part.argmax(-1) for part in split_logits(logits).values()]
    return [tuple(row) for row in torch.stack(best, dim=-1).tolist()]
