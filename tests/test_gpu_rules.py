"""What a GPU asks of a patched model, seen without one: nothing waits for it, nothing is elsewhere.

The tensors of these tests have no values; see `tests.support.fake_gpu`.
"""

from typing import Any

import pytest
import torch

import tomesd
from tests.support import tiny_transformers, tiny_unets, tiny_vits
from tests.support.fake_gpu import can_be_faked, run_on_gpu

pytestmark = pytest.mark.skipif(not can_be_faked(), reason="this torch wants a GPU's driver")

# Of whole blocks: in diffusion transformers no others merge.
OF_BLOCKS: dict[str, dict[str, Any]] = {
    "default": {},
    "drawn": {"use_rand": True},
    "pruned": {"method": "prune"},
}
OF_VIDEOS = OF_BLOCKS | {"across frames": {"across_frames": True}}
OF_UNETS = OF_BLOCKS | {
    "everywhere": {"max_downsample": 8},
    "quality": {"preset": "quality"},
    "paper": {"preset": "paper"},
    "refined": {"merge_queries": False, "refine": 1},
}

# These look at the masks of their texts, patched or not.
WAITING = {
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",
}
TRANSFORMERS = {
    name: tiny
    for name, tiny in (tiny_transformers.TINY | tiny_transformers.CONTROLNETS).items()
    if name not in WAITING
}


def assert_same_on_gpu(patched, unpatched, inputs: dict, dtype=torch.float32) -> None:
    got = run_on_gpu(patched, inputs, dtype)
    assert {device for device, _, _ in got} == {"cuda"}
    assert got == run_on_gpu(unpatched, inputs, dtype)


def _unet(name: str) -> tuple[Any, dict]:
    tiny = tiny_unets.TINY[name]
    return tiny.build(), tiny.inputs() | {"return_dict": False}


def _transformer(name: str, **settings) -> tuple[Any, Any, dict]:
    tiny = TRANSFORMERS[name]
    patched = tomesd.apply_patch(tiny.build(), **settings)
    hooks = patched._tomesd_patch.hooks
    if hooks.family.in_data:  # The one look at the data that the README tells of.
        grids = hooks.family.grids(patched, tiny.inputs())
        hooks.family = hooks.family._replace(grids=lambda model, given: grids)
    return patched, tiny.build(), tiny.inputs() | {"return_dict": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", OF_UNETS)
@pytest.mark.parametrize("name", tiny_unets.TINY)
def test_a_unet_never_waits_for_the_gpu_and_leaves_nothing_on_the_cpu(name, settings, dtype):
    unpatched, inputs = _unet(name)
    patched = tomesd.apply_patch(_unet(name)[0], **OF_UNETS[settings])
    assert_same_on_gpu(patched, unpatched, inputs, dtype)


@pytest.mark.parametrize("settings", OF_VIDEOS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_never_waits_for_the_gpu_and_leaves_nothing_on_the_cpu(name, settings):
    patched, unpatched, inputs = _transformer(name, **OF_VIDEOS[settings])
    assert_same_on_gpu(patched, unpatched, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny_vits.FAMILIES)
def test_a_vit_never_waits_for_the_gpu_and_leaves_nothing_on_the_cpu(name, dtype):
    vit, patched = tiny_vits.build(name), tiny_vits.build(name)
    tomesd.apply_patch(patched.model, r=2)
    assert_same_on_gpu(patched.model, vit.model, vit.inputs, dtype)
