"""Wan and its variants: self-attention with rotary positions; text only in cross-attention."""

from dataclasses import replace
from typing import Any

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, latent_grid
from tomesd.registry import refuse, register

_WAN = Blocks(
    "blocks",
    attention=("attn1",),
    proportional=Bias(4),
    rotary=Rotary("rotary_emb", dim=1),
    # If each frame has its own timestep.
    per_token=(("temb", 1),),
    carrier="rotary_emb",
)

register(
    DiT(_WAN, latent_grid(frames=-3), rope="rope"),
    "diffusers.WanTransformer3DModel",
    "diffusers.ChronoEditTransformer3DModel",
    # What it makes of the face is added between the blocks, to every token.
    "diffusers.WanAnimateTransformer3DModel",
)
# The blocks that make hints get the same tables: no grid can travel in them.
register(
    DiT(
        replace(_WAN, carrier=""),
        latent_grid(frames=-3),
        unmerged=(("vace_blocks", "they hand on what they make of every token"),),
    ),
    "diffusers.WanVACETransformer3DModel",
)


def _why_causal(model: Any) -> str:
    frames = model.config.get("num_frame_per_block", 1)
    if frames == 1:
        return ""
    return f"its config has num_frame_per_block={frames}, which masks later frames"


register(
    DiT(
        replace(_WAN, per_token=(("temb", 2),)),
        latent_grid(frames=-3),
        rope="rope",
        why_not=_why_causal,
    ),
    "diffusers.SkyReelsV2Transformer3DModel",
)
# One table for queries and one for keys, [1, 1, tokens, ...]; its frames come before its channels.
register(
    DiT(replace(_WAN, rotary=Rotary("rotary_emb", dim=2)), latent_grid(frames=1), rope="rope"),
    "diffusers.AnyFlowTransformer3DModel",
)

refuse(
    "its attention lays out the tokens of every frame in a block mask, which merged tokens do not "
    "fill",
    "diffusers.WanAnimate2Transformer3DModel",
)
