"""Joint attention over text and image tokens: Stable Diffusion 3, AuraFlow, QwenImage, CogVideoX.

Only image tokens merge; the text's own stream stays whole and attends to the merged picture. But
for CogVideoX, their processors take no mask. Where there are no rotary positions, every token can
be given its key and value back instead; in QwenImage it cannot.
"""

from typing import Any

from tomesd.patches.diffusers_transformer_family import Blocks, Family, Grid, image_grid


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


FAMILIES = (
    Family(
        ("SD3Transformer2DModel",),
        (
            Blocks(
                text="encoder_hidden_states",
                output=1,
                # The second one in 3.5: of image tokens alone.
                attention=("attn", "attn2"),
                keys=("to_k", "to_v"),
                carrier="joint_attention_kwargs",
            ),
        ),
        image_grid,
        kwargs="joint_attention_kwargs",
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
            Blocks("single_transformer_blocks", leads=True, keys=("to_k", "to_v")),
        ),
        image_grid,
    ),
    Family(
        ("QwenImageTransformer2DModel",),
        (
            Blocks(
                text="encoder_hidden_states",
                output=1,
                rotary="image_rotary_emb",
                rotary_tables=1,
                per_token=("modulate_index",),
                carrier="joint_attention_kwargs",
            ),
        ),
        _listed_shapes,
        kwargs="attention_kwargs",
    ),
    Family(
        ("CogVideoXTransformer3DModel",),
        (
            Blocks(
                text="encoder_hidden_states",
                output=0,
                attention=("attn1",),
                bias=3,
                rotary="image_rotary_emb",
                carrier="attention_kwargs",
            ),
        ),
        _cogvideox_grid,
        kwargs="attention_kwargs",
    ),
)
