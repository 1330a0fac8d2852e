"""Joint attention over text and image tokens, in two streams of which only the image's merges.

The text's own stream stays whole and attends to the merged picture. The text comes first among the
keys, but in Mochi. Many processors take no bias. Where there are no rotary positions, every token
can be given its key and value back instead; in QwenImage, CogView4 and Mochi it cannot.
"""

from typing import Any

from tomesd.diffusion.dit.record import Blocks, Family, Grid, image_grid


def _listed_shapes(model: Any, given: dict) -> tuple[Grid, ...]:
    """QwenImage is told the shapes of its pictures, the same for all samples of a batch."""
    shapes = given["img_shapes"]
    own = shapes[0] if isinstance(shapes[0], list) else shapes
    return tuple((frames, h, w) for frames, h, w in own)


def _cogvideox_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Of latents [B, F, C, H, W]; 1.5 puts several frames into one token."""
    _, frames, _, h, w = given["hidden_states"].shape
    patch, together = model.config.patch_size, model.config.patch_size_t or 1
    return ((-(-frames // together), h // patch, w // patch),)


def _consisid_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Of latents [B, F, C, H, W], as CogVideoX's first version has them."""
    _, frames, _, h, w = given["hidden_states"].shape
    patch = model.config.patch_size
    return ((frames, h // patch, w // patch),)


def _video_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Mochi's latents are [B, C, F, H, W]."""
    frames, h, w = given["hidden_states"].shape[-3:]
    patch = model.config.patch_size
    return ((frames, h // patch, w // patch),)


def _condition_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Of what ControlNets see. Those of 3.5 are given latents that are tokens already."""
    h, w = given["controlnet_cond"].shape[-2:]
    patch = model.config.patch_size
    return ((1, h // patch, w // patch),)


_SD3 = Blocks(
    text="encoder_hidden_states",
    output=1,
    # The second one in 3.5: of image tokens alone.
    attention=("attn", "attn2"),
    keys=("to_k", "to_v"),
)
_QWEN = Blocks(
    text="encoder_hidden_states",
    output=1,
    rotary="image_rotary_emb",
    rotary_at=0,
    per_token=(("modulate_index", 1),),
    carrier="joint_attention_kwargs",
)
_COGVIDEOX = Blocks(
    text="encoder_hidden_states",
    output=0,
    attention=("attn1",),
    bias=3,
    rotary="image_rotary_emb",
)

FAMILIES = (
    Family(
        ("SD3Transformer2DModel",),
        (_SD3._replace(carrier="joint_attention_kwargs"),),
        image_grid,
        kwargs="joint_attention_kwargs",
    ),
    Family(
        ("SD3ControlNetModel",),
        (
            _SD3._replace(of="JointTransformerBlock"),
            Blocks(of="SD3SingleTransformerBlock", keys=_SD3.keys),
        ),
        _condition_grid,
    ),
    Family(
        ("AuraFlowTransformer2DModel",),
        (
            Blocks(
                "joint_transformer_blocks",
                text="encoder_hidden_states",
                output=1,
                keys=("to_k", "to_v"),
            ),
            Blocks("single_transformer_blocks", together=True, keys=("to_k", "to_v")),
        ),
        image_grid,
    ),
    Family(
        ("QwenImageTransformer2DModel",),
        (_QWEN,),
        _listed_shapes,
        kwargs="attention_kwargs",
    ),
    Family(
        ("QwenImageControlNetModel",),
        (_QWEN,),
        _listed_shapes,
        kwargs="joint_attention_kwargs",
    ),
    Family(
        ("CogVideoXTransformer3DModel",),
        (_COGVIDEOX._replace(carrier="attention_kwargs"),),
        _cogvideox_grid,
        kwargs="attention_kwargs",
    ),
    Family(("ConsisIDTransformer3DModel",), (_COGVIDEOX,), _consisid_grid),
    Family(("CogView3PlusTransformer2DModel",), (_COGVIDEOX._replace(rotary=""),), image_grid),
    Family(
        ("CogView4Transformer2DModel",),
        (_COGVIDEOX._replace(bias=0, carrier="attention_kwargs"),),
        image_grid,
        kwargs="attention_kwargs",
    ),
    Family(
        ("MochiTransformer3DModel",),
        (_COGVIDEOX._replace(bias=0, image_first=True, carrier="image_rotary_emb"),),
        _video_grid,
        rope="rope",
    ),
)

REFUSED: dict[str, str] = {}
