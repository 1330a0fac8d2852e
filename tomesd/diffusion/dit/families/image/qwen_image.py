"""Qwen-Image: joint attention of two streams, rotary positions; its processor takes no bias."""

from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Blocks, DiT, Rotary, Text
from tomesd.registry import register


def _listed_shapes(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """The model is told the shapes of its images, the same for all samples of a batch."""
    shapes = given["img_shapes"]
    own = shapes[0] if isinstance(shapes[0], list) else shapes
    return tuple((frames, h, w) for frames, h, w in own)


_JOINT = Blocks(
    text=Text("encoder_hidden_states"),
    output=1,
    rotary=Rotary("image_rotary_emb", table=0),
    per_token=(("modulate_index", 1),),
    carrier="joint_attention_kwargs",
)

register(
    DiT(_JOINT, _listed_shapes, kwargs="attention_kwargs"), "diffusers.QwenImageTransformer2DModel"
)
register(
    DiT(_JOINT, _listed_shapes, kwargs="joint_attention_kwargs"),
    "diffusers.QwenImageControlNetModel",
)
