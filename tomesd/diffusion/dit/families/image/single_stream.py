"""OmniGen, Ideogram 4 and ERNIE-Image: one stream of text and image tokens.

OmniGen and Ideogram mask pairs of tokens: those of an image attend to the same keys, so that merged
ones do too. ERNIE-Image modulates every token of a sample alike.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

# All samples have the positions of the first.
register(
    DiT(
        Blocks(
            "layers",
            text=Text(),
            attention=("self_attn",),
            proportional=Bias(4),
            rotary=Rotary("image_rotary_emb"),
            mask="attention_mask",
            carrier="image_rotary_emb",
        ),
        latent_grid(),
        rope="rope",
    ),
    "diffusers.OmniGenTransformer2DModel",
)

_IMAGE = 2  # The role of its tokens, OUTPUT_IMAGE_INDICATOR of diffusers.
# A pipeline passes the same ids in every step, as in flux.py.
_known = WeakTensorKeyDictionary()


def _last_tokens(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    ids, roles = given["position_ids"], given["indicator"]
    if torch.compiler.is_compiling():
        return _read(roles, ids)
    if ids not in _known:
        _known[ids] = _read(roles, ids)
    known: tuple[Grid, ...] = _known[ids]
    return known


def _read(roles: Tensor, ids: Tensor) -> tuple[Grid, ...]:
    """The image is at the end of every sample: its ids are time, row and column."""
    is_image = (roles == _IMAGE).cpu()
    n = int(is_image[0].sum())
    if not is_image[:, is_image.shape[1] - n :].all() or is_image.sum() != n * len(is_image):
        raise ValueError(
            "indicator must have the image at the end of every sample, and images of one size, "
            "while tokens merge"
        )
    rows = ids[0, ids.shape[1] - n :, 1].cpu()
    w = int((rows == rows[0]).sum())
    return ((1, n // w, w),)


# What torch.compiler.assume_constant_result does, as in flux.py.
setattr(_read, "_dynamo_marked_constant", True)  # noqa: B010

register(
    DiT(
        Blocks(
            "layers",
            text=Text(),
            attention=("attention",),
            proportional=Bias(4),
            rotary=Rotary("image_rotary_emb", dim=1),
            # If each token has its own timestep.
            per_token=(("adaln_input", 1),),
            mask="attention_mask",
        ),
        _last_tokens,
        reads_data=True,
    ),
    "diffusers.Ideogram4Transformer2DModel",
)

register(
    DiT(
        Blocks(
            "layers",
            tokens="x",
            batch_first=False,
            text=Text(first=False),
            attention=("self_attention",),
            proportional=Bias(4),
            rotary=Rotary("rotary_pos_emb", dim=1),
            per_token=(("temb", 0),),
            mask="attention_mask",
        ),
        latent_grid(),
    ),
    "diffusers.ErnieImageTransformer2DModel",
)
