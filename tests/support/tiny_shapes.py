"""The embedded models' architectures with random weights."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from tomesd.shapes import pipeline as shapes


def untrained_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = shapes.build_tokenizer()
    return shapes.build_pipeline(
        shapes.build_autoencoder(),
        shapes.build_text_encoder(tokenizer),
        shapes.build_unet(),
        tokenizer,
    )


def save_untrained(folder: Path) -> Path:
    """Pipeline and classifier in folders of these names; returns the folder that holds both."""
    untrained_pipeline().save_pretrained(folder / "pipeline")
    shapes.build_classifier().save_pretrained(folder / "classifier")
    return folder
