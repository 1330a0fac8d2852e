"""Self-attention and then, but for DiT, cross-attention to the text: PixArt-α and Σ, many videos.

The text is outside of the stream of tokens. Latte's blocks are given one frame at a time, so that
across_frames changes nothing there; its temporal blocks, of one token for each frame, are left
alone. So are those of Hunyuan-DiT's second half, which begin with a projection of the stream and
its long skip connection, and those of Wan's VACE that make hints for the others.
"""

from typing import Any

from tomesd.diffusion.dit.record import Blocks, Family, Grid, image_grid, video_grid


def _video_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Of latents [B, C, F, H, W], cut into patches of frames × height × width."""
    size, patch = given["hidden_states"].shape[-3:], model.config.patch_size
    frames, h, w = (length // step for length, step in zip(size, patch, strict=True))
    return ((frames, h, w),)


def _given_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """LTX-Video is told the size of its packed latents."""
    return ((given["num_frames"], given["height"], given["width"]),)


_IMAGE = Blocks(attention=("attn1",), bias=3)
_PIXART = _IMAGE._replace(carrier="cross_attention_kwargs")
_WAN = Blocks(
    "blocks",
    attention=("attn1",),
    bias=4,
    rotary="rotary_emb",
    rotary_dim=1,
    # Where each frame has its own timestep.
    per_token=(("temb", 1),),
    carrier="rotary_emb",
)

FAMILIES = (
    Family(
        ("PixArtTransformer2DModel",),
        (_PIXART,),
        image_grid,
        kwargs="cross_attention_kwargs",
    ),
    Family(
        ("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
        (_IMAGE._replace(where="blocks", rotary="image_rotary_emb", unless="skip_linear"),),
        image_grid,
    ),
    Family(("LatteTransformer3DModel",), (_IMAGE,), image_grid),
    Family(("DiTTransformer2DModel",), (_PIXART,), image_grid, kwargs="cross_attention_kwargs"),
    Family(
        ("AllegroTransformer3DModel",),
        # Angles for each axis, and then where on it each token is.
        (_IMAGE._replace(rotary="image_rotary_emb", rotary_at=1, rotary_dim=1),),
        video_grid,
    ),
    Family(
        ("WanTransformer3DModel", "ChronoEditTransformer3DModel"),
        (_WAN,),
        _video_grid,
        rope="rope",
    ),
    Family(
        ("WanVACETransformer3DModel",),
        # The blocks that are left alone are given the same tables: no grid can travel in them.
        (_WAN._replace(carrier=""),),
        _video_grid,
        alone=(("vace_blocks", "they hand on what they make of every token"),),
    ),
    Family(
        ("SkyReelsV2Transformer3DModel",),
        (_WAN._replace(per_token=(("temb", 2),)),),
        _video_grid,
        rope="rope",
    ),
    Family(
        ("LTXVideoTransformer3DModel",),
        (
            _IMAGE._replace(
                rotary="image_rotary_emb",
                rotary_dim=1,
                per_token=(("temb", 1),),
                carrier="image_rotary_emb",
            ),
        ),
        _given_grid,
        rope="rope",
    ),
)

_LINEAR = (
    "its attention is linear in the tokens, and its feed-forward is a convolution over their whole "
    "grid, which merged tokens do not have"
)
REFUSED = {
    "SanaControlNetModel": _LINEAR,
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "LTX2VideoTransformer3DModel": (
        "in its blocks, sound and video attend to each other at positions of their own, which "
        "merged tokens do not follow yet"
    ),
}
