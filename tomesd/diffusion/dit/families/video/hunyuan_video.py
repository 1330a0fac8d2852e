"""HunyuanVideo and Motif-Video: joint attention with image tokens first, and masked text.

Of its ways to continue an image, "token_replace" is left unmerged: its blocks treat the tokens of
the first frame differently from the others.
"""

from dataclasses import replace
from typing import Any

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import refuse, register

_TWO_STREAMS = Blocks(
    text=Text("encoder_hidden_states", first=False),
    output=0,
    proportional=Bias(4),
    rotary=Rotary("freqs_cis"),
    mask="attention_mask",
    only="HunyuanVideoTransformerBlock",
    carrier="freqs_cis",
)
_ONE_STREAM = replace(
    _TWO_STREAMS,
    name="single_transformer_blocks",
    rotary=Rotary("image_rotary_emb"),
    only="HunyuanVideoSingleTransformerBlock",
    carrier="image_rotary_emb",
)


def _why_not(model: Any) -> str:
    if model.config.get("image_condition_type") != "token_replace":
        return ""
    return (
        'its config has image_condition_type="token_replace": its blocks treat the tokens of the '
        "first frame differently from the others"
    )


register(
    DiT((_TWO_STREAMS, _ONE_STREAM), latent_grid(frames=-3), rope="rope", why_not=_why_not),
    "diffusers.HunyuanVideoTransformer3DModel",
)

# It makes a mask of the text itself.
register(
    DiT(
        replace(_TWO_STREAMS, proportional=None, mask="", only=""),
        latent_grid(frames=-3),
        rope="rope",
    ),
    "diffusers.HunyuanVideo15Transformer3DModel",
)

# The last of its single blocks read the video that the others made in place of the text.
_MOTIF = replace(
    _TWO_STREAMS, rotary=Rotary("image_rotary_emb"), only="", carrier="image_rotary_emb"
)
register(
    DiT(
        (_MOTIF, replace(_MOTIF, name="single_transformer_blocks")),
        latent_grid(frames=-3),
        rope="rope",
    ),
    "diffusers.MotifVideoTransformer3DModel",
)

refuse(
    "the tokens of its history are of several resolutions, not of one grid",
    "diffusers.HunyuanVideoFramepackTransformer3DModel",
)
