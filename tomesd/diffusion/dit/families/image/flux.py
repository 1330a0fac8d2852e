"""Flux and its variants: joint attention of two streams, then a single one, with rotary positions.

Krea 2 has a single stream only, and the first blocks of Flux3 are of image tokens by themselves.
The token grid is read from the ids that a pipeline makes. The reference images of Kontext, Flux2
and Flux3 have ids of their own: they merge too, each within itself. Samples of a ControlNet are at
full resolution, and so is the stream that they are added to.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text
from tomesd.registry import refuse, register

# The grids of ids that were read before. A pipeline passes the same ids in every step, so reading
# them costs one host sync per image.
_known = WeakTensorKeyDictionary()


def _grids_of_ids(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    return _grids(given["img_ids"])


def _grids(ids: Tensor, name: str = "img_ids", start: int = 0) -> tuple[Grid, ...]:
    if torch.compiler.is_compiling():
        return _read(ids, name, start)
    if ids not in _known:
        _known[ids] = _read(ids, name, start)
    known: tuple[Grid, ...] = _known[ids]
    return known


def _read(ids: Tensor, name: str, start: int) -> tuple[Grid, ...]:
    """Images one after another; each has its own first coordinate, followed by row and column.

    start: where they begin among the ids.

    In a model that is compiled as part of something else, this runs on the example inputs and the
    code is for their grid: every image with the same number of tokens reuses it. A model that is
    compiled by itself reads each one: see `grid_hook`.
    """
    ids = (ids[0] if ids.dim() == 3 else ids)[start:].cpu()
    starts = (ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1
    grids = []
    for image in ids.tensor_split(starts):
        rows, columns = image[:, 1], image[:, 2]
        w = int((rows == rows[0]).sum())
        h = len(rows) // w
        if h * w != len(rows) or not (
            torch.equal(rows, rows[::w].repeat_interleave(w))
            and torch.equal(columns, columns[:w].repeat(h))
        ):
            raise ValueError(
                f"{name} must list the tokens of each image row by row, got {len(rows)} tokens "
                f"of which {w} are in the first row"
            )
        grids.append((1, h, w))
    return tuple(grids)


# What torch.compiler.assume_constant_result does, which would import all of the compiler.
setattr(_read, "_dynamo_marked_constant", True)  # noqa: B010


def _grids_after_text(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    text = given["encoder_hidden_states"].shape[1]
    return _grids(given["position_ids"], "position_ids", start=text)


def _grids_and_references(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    own, references = _grids_of_ids(model, given), given.get("image_cond_ids")
    return own if references is None else own + _grids(references, "image_cond_ids")


def _grids_without_cache(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    if given.get("kv_cache_mode") is not None:
        raise ValueError(
            f"kv_cache_mode must be None while tokens merge, got {given['kv_cache_mode']!r}: keys "
            "cached in another step belong to other tokens"
        )
    return _grids_of_ids(model, given)


_TWO_STREAMS = Blocks(
    text=Text("encoder_hidden_states"),
    output=1,
    proportional=Bias(4),
    rotary=Rotary("image_rotary_emb"),
    carrier="image_rotary_emb",
)
# Flux splits its single stream between the blocks; Chroma and Flux2 do not.
_SPLIT_STREAM = replace(_TWO_STREAMS, name="single_transformer_blocks")
_ONE_STREAM = replace(_SPLIT_STREAM, text=Text(), output=None)

register(
    DiT((_TWO_STREAMS, _SPLIT_STREAM), _grids_of_ids, rope="pos_embed", reads_data=True),
    "diffusers.FluxTransformer2DModel",
    "diffusers.FluxControlNetModel",
    "diffusers.BriaTransformer2DModel",
    "diffusers.LongCatImageTransformer2DModel",
    "diffusers.OvisImageTransformer2DModel",
)

# Padded text is masked.
register(
    DiT(
        (
            replace(_TWO_STREAMS, mask="attention_mask"),
            replace(_ONE_STREAM, mask="attention_mask"),
        ),
        _grids_of_ids,
        rope="pos_embed",
        reads_data=True,
    ),
    "diffusers.ChromaTransformer2DModel",
)

# Its tables of text and image are concatenated after they are made.
register(
    DiT(
        (
            replace(_TWO_STREAMS, carrier="joint_attention_kwargs"),
            replace(_ONE_STREAM, carrier="joint_attention_kwargs"),
        ),
        _grids_without_cache,
        kwargs="joint_attention_kwargs",
        reads_data=True,
    ),
    "diffusers.Flux2Transformer2DModel",
)

register(
    DiT(
        replace(
            _TWO_STREAMS,
            text=Text(),
            output=None,
            mask="attention_mask",
        ),
        _grids_after_text,
        rope="rotary_emb",
        reads_data=True,
    ),
    "diffusers.Krea2Transformer2DModel",
)

register(
    DiT(
        (
            Blocks(
                "mode_blocks.image",
                images=(0, 1),
                proportional=Bias(4),
                rotary=Rotary("image_rotary_emb"),
                per_token=(("temb_mod", 1),),
            ),
            replace(_SPLIT_STREAM, per_token=(("temb_mod", 1),), carrier=""),
        ),
        _grids_and_references,
        reads_data=True,
        unmerged=(("mode_blocks.image_cond", "they are of reference images by themselves"),),
    ),
    "diffusers.Flux3Transformer2DModel",
)

refuse(
    "it keeps keys from step to step, which would be of other tokens; use "
    "Flux2KleinPipeline(**pipe.components)",
    "diffusers.Flux2KleinKVPipeline",
)
refuse(
    "its pipeline masks pairs of tokens, which merged tokens cannot follow",
    "diffusers.BriaFiboTransformer2DModel",
)
