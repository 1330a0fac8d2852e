"""HunyuanVideo and HunyuanImage: joint attention with the image tokens first, and masked text.

Of HunyuanVideo's ways to continue a picture, "token_replace" is left out: its blocks treat the
first so many tokens in another way than the others.
"""

from typing import Any

from tomesd.diffusion.dit.record import Blocks, Family, Grid, video_grid


def _image_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Of latents [B, C, H, W], or of those of a refiner with one frame more."""
    *frames, h, w = given["hidden_states"].shape[2:]
    *together, patch_h, patch_w = model.config.patch_size
    first = frames[0] // together[0] if frames else 1
    return ((first, h // patch_h, w // patch_w),)


_TWO_STREAMS = Blocks(
    text="encoder_hidden_states",
    image_first=True,
    output=0,
    bias=4,
    mask="attention_mask",
    rotary="image_rotary_emb",
    carrier="image_rotary_emb",
)
_ONE_STREAM = _TWO_STREAMS._replace(where="single_transformer_blocks")
# These call their tables so in two streams.
_VIDEO = _TWO_STREAMS._replace(rotary="freqs_cis", carrier="freqs_cis")

FAMILIES = (
    Family(
        ("HunyuanVideoTransformer3DModel",),
        (
            _VIDEO._replace(of="HunyuanVideoTransformerBlock"),
            _ONE_STREAM._replace(of="HunyuanVideoSingleTransformerBlock"),
        ),
        video_grid,
        rope="rope",
    ),
    Family(
        ("HunyuanVideo15Transformer3DModel",),
        # It makes a mask of its own, of the text's.
        (_VIDEO._replace(bias=0, mask=""),),
        video_grid,
        rope="rope",
    ),
    Family(
        ("HunyuanImageTransformer2DModel",),
        (_TWO_STREAMS, _ONE_STREAM),
        _image_grid,
        rope="rope",
    ),
)

REFUSED = {
    "HunyuanVideoFramepackTransformer3DModel": (
        "the tokens of its history are of several resolutions, not of one grid"
    ),
}
