"""Lumina-Next: self-attention, and text in cross-attention; Lumina 2: one stream of text and image.

Of Lumina 2, the blocks that refine image tokens merge too. Their processors take no bias.
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

# Its processor makes a boolean mask of the one it is given.
register(
    DiT(
        Blocks(
            "layers",
            attention=("attn1",),
            rotary=Rotary("image_rotary_emb", dim=1),
            mask="attention_mask",
            carrier="cross_attention_kwargs",
        ),
        latent_grid(),
        kwargs="cross_attention_kwargs",
    ),
    "diffusers.LuminaNextDiT2DModel",
)
