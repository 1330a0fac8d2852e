"""Diffusion transformers of diffusers."""

from tomesd.diffusion.dit.grids import latent_grid
from tomesd.diffusion.dit.patch import DiTPatch
from tomesd.diffusion.dit.spec import Bias, Blocks, DiT, Override, Rotary, Text, UnmergeKeys

__all__ = [
    "Bias",
    "Blocks",
    "DiT",
    "DiTPatch",
    "Override",
    "Rotary",
    "Text",
    "UnmergeKeys",
    "latent_grid",
]
