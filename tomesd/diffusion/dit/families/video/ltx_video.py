"""LTX-Video: self-attention of packed latents, whose grid the model is told.

Pipelines that have conditions tell it the coordinates of the tokens instead. Frames of conditions
are of the video's size, and merge as its own do.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary
from tomesd.registry import refuse, register

# The grids of coordinates that were read before: a pipeline passes the same ones in every step.
_known = WeakTensorKeyDictionary()


def _given_grid(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    coordinates = given.get("video_coords")
    if coordinates is None:
        return ((given["num_frames"], given["height"], given["width"]),)
    if torch.compiler.is_compiling():
        return _read(coordinates)
    if coordinates not in _known:
        _known[coordinates] = _read(coordinates)
    known: tuple[Grid, ...] = _known[coordinates]
    return known


def _read(coordinates: Tensor) -> tuple[Grid, ...]:
    """Of [B, 3, tokens]: frame by frame, and row by row in each."""
    places = coordinates[0, 1:].T.cpu()
    n = len(places)
    size = _next(places == places[0])
    w = min(size, _next(places[:, 1:] == places[0, 1:]))
    h = size // w
    rows, columns = places[: h * w : w, 0], places[:w, 1]
    raster = torch.stack([rows.repeat_interleave(w), columns.repeat(h)], dim=1)
    if n % size or not torch.equal(places, raster.repeat(n // size, 1)):
        raise ValueError(
            "video_coords must list the tokens of frames of one size, row by row, while tokens "
            f"merge, got {n} tokens of which {w} are in the first row"
        )
    return ((n // size, h, w),)


def _next(same: Tensor) -> int:
    """Where the first token's place comes again, or how many tokens there are."""
    again = same[1:].all(dim=1).nonzero()
    return int(again[0]) + 1 if len(again) else len(same)


# What torch.compiler.assume_constant_result does, as in flux.py.
setattr(_read, "_dynamo_marked_constant", True)  # noqa: B010

register(
    DiT(
        Blocks(
            attention=("attn1",),
            proportional=Bias(3),
            rotary=Rotary("image_rotary_emb", dim=1),
            per_token=(("temb", 1),),
            carrier="image_rotary_emb",
        ),
        _given_grid,
        rope="rope",
        reads_data=True,
    ),
    "diffusers.LTXVideoTransformer3DModel",
)

refuse(
    "in its blocks, sound and video attend to each other at positions of their own, which merged "
    "tokens do not follow yet",
    "diffusers.LTX2VideoTransformer3DModel",
)
