"""Flux's grids come from its image ids, reference pictures included."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tomesd
from tests.support.recorders import AttentionRecorder
from tests.support.tiny_transformers import TINY, ids

FLUX = TINY["FluxTransformer2DModel"]


def _map(model) -> tuple[Tensor, list]:
    """The first block's token map in one forward pass, as groups of the first sample."""
    block, hooks = next(iter(model._tomesd_patch.blocks.items()))
    seen = []
    handle = block.register_forward_pre_hook(lambda *_: seen.append(hooks.model.state.map))
    return handle, seen


@torch.no_grad()
def test_reference_pictures_merge_too_each_within_itself():
    """As in Kontext: the ids of the reference follow the picture's own."""
    own, reference = (4, 6), (5, 3)
    both = torch.cat([ids(*own), ids(*reference, picture=1)])
    model = tomesd.apply_patch(FLUX.build(), ratio=0.5)
    tokens = torch.randn(2, 24 + 15, 4)
    handle, seen = _map(model)
    output = FLUX.call(model, hidden_states=tokens, img_ids=both)
    handle.remove()
    assert output.isfinite().all()
    (token_map,) = seen
    assert token_map.m == 12 + 8
    assert (token_map.group[:, :24] < 12).all()
    assert (token_map.group[:, 24:] >= 12).all()


@torch.no_grad()
def test_a_reference_too_small_to_merge_does_not_hide_that_the_image_merges():
    """The last grid is not the only one: no warning, and no word of it in the report."""
    both = torch.cat([ids(8, 8), ids(2, 2, picture=1)])
    model = tomesd.apply_patch(FLUX.build(), ratio=0.5, min_tokens=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FLUX.call(model, hidden_states=torch.randn(2, 64 + 4, 4), img_ids=both)
    (rows,) = tomesd.report(model).rows.values()
    assert [(row.merged, row.note) for row in rows] == [(32 + 4, "")] * 2


@torch.no_grad()
def test_ids_may_be_scaled_or_shifted():
    model = tomesd.apply_patch(FLUX.build(), ratio=0.5)
    moved = ids(5, 7)
    moved[:, 1:] = moved[:, 1:] * 0.5 + 3
    with AttentionRecorder() as attention:
        FLUX.call(model, img_ids=moved)
    assert attention.seen == [(5 + 18, 5 + 18)] * 2


@torch.no_grad()
def test_samples_with_one_table_of_positions_merge_alike():
    model = tomesd.apply_patch(FLUX.build(), ratio=0.5)
    handle, seen = _map(model)
    FLUX.call(model, batch=3)
    handle.remove()
    (token_map,) = seen
    assert torch.equal(token_map.group, token_map.group[:1].expand(3, -1))


class _Copies(TorchFunctionMode):
    """Counts copies to the CPU: on a GPU, each is a sync."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.nonzero)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_image_ids_are_read_once_for_a_picture_and_not_in_every_step():
    model = tomesd.apply_patch(FLUX.build(), ratio=0.5)
    own = ids(5, 7)
    counts = []
    for _ in range(3):
        with _Copies() as copies:
            FLUX.call(model, img_ids=own)
        counts.append(copies.count)
    plain = FLUX.build()
    with _Copies() as copies:
        FLUX.call(plain, img_ids=own)
    assert counts[0] > counts[1] == counts[2] == copies.count


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
@torch.no_grad()
def test_a_single_sample_merges_as_it_would_without_a_shared_map(name):
    """With one sample in the batch, sharing its map with the others changes nothing."""
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    one = tiny.call(model, batch=1)
    twins = {
        key: value.expand(2, *value.shape[1:])
        for key, value in tiny.inputs(batch=1).items()
        if isinstance(value, Tensor) and key not in ("img_ids", "txt_ids")
    }
    both = tiny.call(model, batch=2, **twins)
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-5)
