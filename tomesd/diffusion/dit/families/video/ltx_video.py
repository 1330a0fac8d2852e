"""LTX-Video: self-attention of packed latents, whose grid the model is told."""

from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary
from tomesd.registry import refuse, register


def _given_grid(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    return ((given["num_frames"], given["height"], given["width"]),)


register(
    DiT(
        Blocks(
            attention=("attn1",),
            proportional=Bias(3),
            rotary=Rotary("image_rotary_emb", dim=1),
            per_token=(("temb", 1),),
            carrier="image_rotary_emb",
        ),
        _given_grid,
        rope="rope",
    ),
    "diffusers.LTXVideoTransformer3DModel",
)

refuse(
    "in its blocks, sound and video attend to each other at positions of their own, which merged "
    "tokens do not follow yet",
    "diffusers.LTX2VideoTransformer3DModel",
)
