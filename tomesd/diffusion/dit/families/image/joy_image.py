"""JoyImage: joint attention with image tokens first. Its reference images merge too."""

from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

_frames = latent_grid(frames=-3)


def _items(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """Latents [B, C, F, H, W], or [B, items, C, F, H, W] of several images of one size."""
    shape = given["hidden_states"].shape
    ((frames, h, w),) = _frames(model, given)
    return ((frames, h, w),) * (shape[1] if len(shape) == 6 else 1)


def _listed(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """The model is told the shapes of each sample's images."""
    shapes = {tuple(map(tuple, sample)) for sample in given["shape_list"]}
    if len(shapes) != 1:
        raise ValueError(
            "shape_list must have the same images for every sample while tokens merge, got "
            f"{sorted(shapes)}: pass one sample at a time"
        )
    (sample,) = shapes
    return tuple((frames, h, w) for frames, h, w in sample)


# Its processor takes no bias.
register(
    DiT(
        Blocks(
            "double_blocks",
            text=Text("encoder_hidden_states", first=False),
            output=0,
            rotary=Rotary("image_rotary_emb", table=0),
        ),
        _items,
    ),
    "diffusers.JoyImageEditTransformer3DModel",
)
register(
    DiT(
        Blocks(
            "double_blocks",
            text=Text("encoder_hidden_states", first=False),
            output=0,
            proportional=Bias(4),
            rotary=Rotary("image_rotary_emb", dim=1),
            mask="attention_mask",
        ),
        _listed,
    ),
    "diffusers.JoyImageEditPlusTransformer3DModel",
)
