"""Lumina 2: one stream of text and image tokens; the blocks that refine image tokens merge too.

Its processor takes no bias.
"""

from tomesd.diffusion.dit import Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register


def _blocks(name: str) -> Blocks:
    # Each sample has a text of its own length, hence its own angles.
    return Blocks(name, text=Text(), rotary=Rotary("image_rotary_emb", dim=1))


register(
    DiT((_blocks("noise_refiner"), _blocks("layers")), latent_grid()),
    "diffusers.Lumina2Transformer2DModel",
)
