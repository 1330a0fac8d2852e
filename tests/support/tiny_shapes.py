"""The embedded models' architectures with random weights."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from benchmarks.training import architectures


def untrained_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = architectures.build_tokenizer()
    return architectures.build_pipeline(
        architectures.build_autoencoder(),
        architectures.build_text_encoder(tokenizer),
        architectures.build_unet(),
        tokenizer,
    )


def save_untrained(folder: Path) -> Path:
    """Pipeline and classifier in folders of these names; returns the folder that holds both."""
    untrained_pipeline().save_pretrained(folder / "pipeline")
    architectures.build_classifier().save_pretrained(folder / "classifier")
    return folder
