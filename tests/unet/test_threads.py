"""Threads that share a patched UNet do not mix their sizes; copies have patches of their own."""

import copy
import pickle
from functools import partial
from itertools import product

import pytest
import torch

import tomesd
from tests.support.threads import meeting, side_by_side
from tests.support.tiny_unets import TINY

SIZES = [
    {"h": 6, "w": 10, "timestep": torch.tensor(900)},
    {"h": 8, "w": 4, "batch": 1, "timestep": torch.tensor(20)},
]
OTHER_SETTINGS = [{}, {"merge_attn": True}, {"merge_queries": False}]


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


@torch.no_grad()
def _predict(tiny, model, **given) -> torch.Tensor:
    return tiny.call(model, **given)


def _together(tiny, model, watched) -> list[torch.Tensor]:
    """Each size's output, from threads that enter and leave the watched modules together."""
    calls = [partial(_predict, tiny, model, **size) for size in SIZES]
    return [output for (output,) in side_by_side(calls, meet_in=watched)]


# How blocks merge is the same code in every kind of UNet; what travels to them is not.
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *product(TINY, [{"use_rand": True}]),
        *product(["UNet2DConditionModel", "UNetSpatioTemporalConditionModel"], OTHER_SETTINGS),
    ],
    ids=str,
)
def test_threads_with_other_sizes_and_timesteps_get_what_each_gets_alone(name, settings):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build(), max_downsample=8, **settings)
    alone = [_predict(tiny, model, **size) for size in SIZES]
    # The threads enter and leave every transformer, block and attention together.
    kinds = (*tomesd.supported()["diffusers"], "BasicTransformerBlock", "Attention")
    watched = [module for module in model.modules() if type(module).__name__ in kinds]
    watched += [found.module for found in model._tomesd_patch.transformers]
    together = _together(tiny, model, watched)
    assert len(together) == len(alone)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_threads_that_share_a_unet_train_with_checkpointing(tiny):
    model = tomesd.apply_patch(tiny.build().train(), use_rand=True)
    if not model._supports_gradient_checkpointing:
        pytest.skip("diffusers' own model knows no gradient checkpointing")
    model.enable_gradient_checkpointing()

    def gradient(size: dict, before_backward) -> torch.Tensor:
        loss = tiny.call(model, **size).square().mean()
        before_backward()
        weight = next(iter(model._tomesd_patch.blocks)).attn1.to_q.weight
        return torch.autograd.grad(loss, weight)[0]

    expected = [gradient(size, lambda: None) for size in SIZES]
    barrier = meeting(len(SIZES))
    calls = [partial(gradient, size, barrier.wait) for size in SIZES]
    for (got,), want in zip(side_by_side(calls), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_a_copy_of_a_patched_unet_has_a_patch_of_its_own(tiny, copied):
    model = tomesd.apply_patch(tiny.build(), use_rand=True)
    expected = _predict(tiny, model)
    other = copied(model)
    tomesd.remove_patch(model)
    unpatched = _predict(tiny, model)
    assert torch.equal(_predict(tiny, other), expected)
    assert torch.equal(_predict(tiny, model), unpatched)
    assert torch.equal(_predict(tiny, tomesd.remove_patch(other)), unpatched)


def test_a_forward_that_was_interrupted_leaves_nothing_that_the_next_one_sees(tiny):
    model = tiny.build()
    small = _predict(tiny, model, **SIZES[1])
    tomesd.apply_patch(model, min_tokens=40)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    first = next(iter(model._tomesd_patch.blocks))
    handle = first.ff.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _predict(tiny, model, **SIZES[0])
    handle.remove()
    with pytest.warns(UserWarning, match="fewer than min_tokens=40"):
        assert torch.equal(_predict(tiny, model, **SIZES[1]), small)
