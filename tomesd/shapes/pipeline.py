"""The models of the Shapes world: small, real diffusion pipelines and a ViT classifier."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, StableDiffusionPipeline
from transformers import ViTForImageClassification

from tomesd.shapes.names import ASSETS, DEFAULT, PIPELINES
from tomesd.shapes.world import COLORS, KINDS, SHAPES

# The classifier has one group of logits for each thing that it reads off a picture.
LABELS = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "kind": KINDS,
    "ground": tuple(COLORS),
}


class TransformerPipeline(PixArtAlphaPipeline):  # type: ignore[misc]
    """PixArt's pipeline, at 128 px and for short prompts unless it is told otherwise.

    PixArt's own defaults are to round to its sizes, 256 px and more, and 120 tokens of text. It
    takes two steps or more, but with DDIM.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        usual = {
            "use_resolution_binning": False,
            "clean_caption": False,  # Or it warns that Beautiful Soup is missing.
            "max_sequence_length": self.tokenizer.model_max_length,
        }
        return super().__call__(*args, **(usual | kwargs))


def folder_of(model: str | Path) -> Path:
    """The folder of an embedded pipeline, by its name; any other model is a folder itself.

    >>> folder_of("few-step").name
    'few-step'
    """
    embedded = PIPELINES.get(str(model))
    return Path(model) if embedded is None else ASSETS / embedded.folder


def load_pipeline(
    model: str | Path = DEFAULT, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """An embedded text-to-image pipeline of the Shapes world, 128×128 px.

    >>> load_pipeline()("a photo of a red heart on a blue striped background").images[0].size
    (128, 128)

    model: "unet", a Stable Diffusion for 25 steps with guidance 4; "few-step", its UNet distilled
        to 4 steps by latent consistency; "transformer", a PixArt of 256 tokens; or a folder that
        scripts/train_shapes.py made.
    Raises FileNotFoundError if it is not there.
    """
    folder = folder_of(model)
    _require(folder)
    index = json.loads((folder / "model_index.json").read_text())
    kind = TransformerPipeline if "transformer" in index else StableDiffusionPipeline
    return kind.from_pretrained(folder, dtype=dtype)


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
