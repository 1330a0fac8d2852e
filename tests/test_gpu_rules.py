"""What a GPU asks of a patched model, seen without one: no syncs, and nothing on the CPU.

The tensors of these tests have no values; see `tests.support.fake_gpu`.
"""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import tomesd
from tests.support import tiny_transformers, tiny_unets, tiny_vits
from tests.support.fake_gpu import Outputs, can_be_faked, run_on_gpu
from tests.support.slow import slow, slow_but

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
CHOSEN = list(OF_UNETS)[1:]

# These look at the masks or places of their texts, or select by a mask, patched or not.
SYNCING = {
    "BriaFibo2Transformer2DModel",
    "GlmImageTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "OmniGenTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",
}
TRANSFORMERS = {
    name: tiny
    for name, tiny in (tiny_transformers.TINY | tiny_transformers.CONTROLNETS).items()
    if name not in SYNCING
}

UNETS = ["UNet2DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel"]
OTHER_UNETS = [name for name in tiny_unets.TINY if name not in UNETS]
# These are hooked as another transformer is.
VARIANTS = [
    "BriaTransformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "ChronoEditTransformer3DModel",
    "FluxControlNetModel with modes",
    "SD3ControlNetModel of tokens",
]


def _on_gpu(tiny, model, dtype: torch.dtype) -> Outputs:
    return run_on_gpu(model, tiny.inputs() | {"return_dict": False}, dtype)


@cache
def _unpatched_unet(name: str, dtype: torch.dtype) -> Outputs:
    tiny = tiny_unets.TINY[name]
    return _on_gpu(tiny, tiny.build(), dtype)


@cache
def _unpatched_transformer(name: str) -> Outputs:
    tiny = TRANSFORMERS[name]
    return _on_gpu(tiny, tiny.build(), torch.float32)


def _patched_transformer(name: str, **settings) -> Any:
    tiny = TRANSFORMERS[name]
    patched = tomesd.apply_patch(tiny.build(), **settings)
    hooks = patched._tomesd_patch.hooks
    if hooks.spec.reads_data:  # The one host sync, which docs/compatibility.md names.
        grids = hooks.spec.grids(patched, tiny.inputs())
        hooks.spec = replace(hooks.spec, grids=lambda model, given: grids)
    return patched


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        # A picture's and two videos' UNets, and every setting with one of them.
        *product(UNETS, ["default"], [torch.bfloat16]),
        *product(UNETS[:1], CHOSEN, [torch.bfloat16]),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                *product(tiny_unets.TINY, ["default"], [torch.float32]),
                *product(
                    [name for name in tiny_unets.TINY if name not in UNETS],
                    ["default"],
                    [torch.bfloat16],
                ),
                *product(list(tiny_unets.TINY)[1:], CHOSEN, [torch.bfloat16]),
            )
        ),
    ],
)
def test_a_unet_never_syncs_and_leaves_nothing_on_the_cpu(name, settings, dtype):
    tiny = tiny_unets.TINY[name]
    patched = _on_gpu(tiny, tomesd.apply_patch(tiny.build(), **OF_UNETS[settings]), dtype)
    assert {device for device, _, _ in patched} == {"cuda"}
    assert patched == _unpatched_unet(name, dtype)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # How tokens are chosen is the same code in every family, where they are is its own.
        *product([name for name in TRANSFORMERS if name not in VARIANTS], ["default"]),
        *product(tiny_transformers.KINDS, ["drawn", "pruned"]),
        (tiny_transformers.WAN, "across frames"),
        *(pytest.param(name, "default", marks=slow) for name in VARIANTS),
        *(
            pytest.param(name, "across frames", marks=slow)
            for name, tiny in TRANSFORMERS.items()
            if tiny.frames > 1 and name != tiny_transformers.WAN
        ),
    ],
)
def test_a_transformer_never_syncs_and_leaves_nothing_on_the_cpu(name, settings):
    model = _patched_transformer(name, **OF_VIDEOS[settings])
    patched = _on_gpu(TRANSFORMERS[name], model, torch.float32)
    assert {device for device, _, _ in patched} == {"cuda"}
    assert patched == _unpatched_transformer(name)


# Images padded to the size of a batch: SigLIP 2 looks at the values of its mask itself, and tomesd
# checks those of a mask once in each forward.
MASKED = {"SigLIP 2", "Idefics 2", "Idefics 3", "SmolVLM"}
# EoMT looks at the probabilities of its own masks, patched or not.
SYNCING_VITS = {"EoMT", "EoMT DINOv3"}


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize(
    "name", [name for name in tiny_vits.FAMILIES if name not in MASKED | SYNCING_VITS]
)
def test_a_vit_never_syncs_and_leaves_nothing_on_the_cpu(name, dtype):
    vit = tiny_vits.build(name)
    vit.output()  # BEiT's class caches a tensor: a real one, for the tests that follow.
    unpatched = run_on_gpu(vit.model, vit.inputs, dtype)
    patched = run_on_gpu(tomesd.apply_patch(vit.model, r=2), vit.inputs, dtype)
    assert {device for device, _, _ in patched} == {"cuda"}
    assert patched == unpatched
