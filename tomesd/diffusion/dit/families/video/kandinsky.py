"""Kandinsky 5 and 6: self-attention with rotary positions; text only in cross-attention.

Their latents have the channels last. The processor of Kandinsky 5 takes no bias. The sound of
Kandinsky 6 attends to the tokens of the video in the same blocks, and weighs them too.
"""

from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary
from tomesd.registry import refuse, register


def _channels_last(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    if given.get("sparse_params") is not None:
        raise ValueError(
            "sparse_params must be None while tokens merge, since merged tokens do not form the "
            "blocks of sparse attention: use a model whose config has attention_type='regular'"
        )
    time, h, w = model.config.patch_size
    shape = given["hidden_states"].shape
    return ((shape[1] // time, shape[2] // h, shape[3] // w),)


def _why_not(model: Any) -> str:
    kind = model.config.get("attention_type", "regular")
    if kind == "regular":
        return ""
    return f"its config has attention_type={kind!r}, whose blocks of tokens merged ones do not form"


register(
    DiT(
        Blocks(
            "visual_transformer_blocks",
            tokens="visual_embed",
            attention=("self_attention",),
            rotary=Rotary("rope", dim=1),
        ),
        _channels_last,
        why_not=_why_not,
    ),
    "diffusers.Kandinsky5Transformer3DModel",
)
register(
    DiT(
        Blocks(
            "visual_transformer_blocks",
            tokens="vis",
            output=0,
            attention=("video_dec_block.self_attention", "av_cross_attention"),
            proportional=Bias(4, "attn_mask"),
            rotary=Rotary("vis_rope"),
        ),
        _channels_last,
    ),
    "diffusers.Kandinsky6Transformer3DModel",
)

refuse(
    "its attention is sparse over blocks of 8 × 8 tokens, which merged tokens do not form",
    "diffusers.Kandinsky6SRTransformer3DModel",
)
