"""The hosts whose Vision Transformers merge; importing a module registers its classes."""

from tomesd.vit.hosts import (
    biased_keys,
    grids,
    packed,
    placed,
    rotary,
    sound,
    timm,
    torchvision,
    towers,
    transformers,
)

__all__ = [
    "biased_keys",
    "grids",
    "packed",
    "placed",
    "rotary",
    "sound",
    "timm",
    "torchvision",
    "towers",
    "transformers",
]
