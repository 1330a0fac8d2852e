"""JoyImage and HiDream: joint attention with image tokens first.

The reference images of JoyImage merge too. HiDream pads pictures that are not square, after the
image and before the text, and the padding stays as it is. Its experts are chosen by each token for
itself.
"""

from dataclasses import replace
from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

_frames, _images = latent_grid(frames=-3), latent_grid()


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


def _latents(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    if given.get("hidden_states_masks") is not None:
        raise ValueError(
            "hidden_states must be latents [B, C, H, W] while tokens merge, got tokens with "
            "hidden_states_masks"
        )
    return _images(model, given)


_HIDREAM = Blocks(
    "double_stream_blocks",
    text=Text("encoder_hidden_states", first=False),
    output=0,
    attention=("block.attn1",),
    rotary=Rotary("image_rotary_emb", dim=1),
    per_token=(("hidden_states_masks", 1),),
    padded=True,
)
register(
    DiT(
        (
            _HIDREAM,
            replace(_HIDREAM, name="single_stream_blocks", text=Text(first=False), output=None),
        ),
        _latents,
        timestep="timesteps",
    ),
    "diffusers.HiDreamImageTransformer2DModel",
)
