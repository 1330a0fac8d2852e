"""Transformers that make images."""

from tomesd.diffusion.dit.families.image import (
    aura_flow,
    cogview,
    flux,
    hunyuan,
    lumina,
    pixart,
    qwen_image,
    sd3,
    z_image,
)

__all__ = [
    "aura_flow",
    "cogview",
    "flux",
    "hunyuan",
    "lumina",
    "pixart",
    "qwen_image",
    "sd3",
    "z_image",
]
