"""Flux and its kin: joint attention in two streams, then in a single one, and rotary positions.

The token grid is read from the image ids that a pipeline makes. The reference pictures of Kontext
and Flux2 have ids of their own: they merge too, each within itself. Of a ControlNet, all samples
that it hands over are of full resolution, and so is the stream that they are added to.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.diffusion.dit.record import Blocks, Family, Grid

# The grids of ids already read. A pipeline hands over the same ids in every step, so that looking
# at them costs one host synchronisation for a picture.
_known = WeakTensorKeyDictionary()


def _grids_of_ids(model: Any, given: dict) -> tuple[Grid, ...]:
    ids = given["img_ids"]
    if torch.compiler.is_compiling():
        return _read(ids)
    if ids not in _known:
        _known[ids] = _read(ids)
    return _known[ids]


def _read(ids: Tensor) -> tuple[Grid, ...]:
    """The pictures one after another; each has a first coordinate of its own, then row and column.

    Where a model is compiled as a part of something, this runs on the example inputs, and the code
    is for their grid. A later one of just as many tokens is not noticed then: its cells are those
    of the first. A model that is compiled by itself notices: see `grid_hook`.
    """
    ids = (ids[0] if ids.dim() == 3 else ids).cpu()
    starts = (ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1
    grids = []
    for picture in ids.tensor_split(starts):
        rows, columns = picture[:, 1], picture[:, 2]
        w = int((rows == rows[0]).sum())
        h = len(rows) // w
        if h * w != len(rows) or not (
            torch.equal(rows, rows[::w].repeat_interleave(w))
            and torch.equal(columns, columns[:w].repeat(h))
        ):
            raise ValueError(
                f"img_ids must list the tokens of each picture row by row, got {len(rows)} tokens "
                f"of which {w} are in the first row"
            )
        grids.append((1, h, w))
    return tuple(grids)


# What torch.compiler.assume_constant_result does, which would import all of the compiler.
setattr(_read, "_dynamo_marked_constant", True)  # noqa: B010


def _grids_without_cache(model: Any, given: dict) -> tuple[Grid, ...]:
    if given.get("kv_cache_mode") is not None:
        raise ValueError(
            f"kv_cache_mode must be None while tokens merge, got {given['kv_cache_mode']!r}: keys "
            "that are kept from step to step would be of other tokens"
        )
    return _grids_of_ids(model, given)


_TWO_STREAMS = Blocks(
    text="encoder_hidden_states",
    output=1,
    bias=4,
    rotary="image_rotary_emb",
    carrier="image_rotary_emb",
)
_ONE_STREAM = _TWO_STREAMS._replace(where="single_transformer_blocks")
# A single stream that comes with the text in front.
_TOGETHER = _ONE_STREAM._replace(text="", together=True, output=None)

FAMILIES = (
    Family(
        (
            "FluxTransformer2DModel",
            "FluxControlNetModel",
            "BriaTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ),
        (_TWO_STREAMS, _ONE_STREAM),
        _grids_of_ids,
        rope="pos_embed",
        in_data=True,
    ),
    Family(
        ("ChromaTransformer2DModel",),
        # Padded text is masked.
        (_TWO_STREAMS._replace(mask="attention_mask"), _TOGETHER._replace(mask="attention_mask")),
        _grids_of_ids,
        rope="pos_embed",
        in_data=True,
    ),
    Family(
        ("Flux2Transformer2DModel",),
        # Its tables of text and image are put together after they are made.
        (
            _TWO_STREAMS._replace(carrier="joint_attention_kwargs"),
            _TOGETHER._replace(carrier="joint_attention_kwargs"),
        ),
        _grids_without_cache,
        kwargs="joint_attention_kwargs",
        in_data=True,
    ),
)

REFUSED = {
    "BriaFiboTransformer2DModel": (
        "its pipeline masks pairs of tokens, which merged tokens are not"
    ),
}
