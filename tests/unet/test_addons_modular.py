"""Modular pipelines of diffusers: their models are found as those of any other pipeline are."""

import pytest
import torch
from diffusers import FluxAutoBlocks, StableDiffusionXLAutoBlocks
from torch import Tensor

import tomesd
from tests.support.tiny_pipelines import sdxl_components
from tests.support.tiny_transformers import TINY

FLUX = TINY["FluxTransformer2DModel"]


@pytest.fixture
def pipe():
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**sdxl_components())
    return pipe


def _picture(pipe) -> Tensor:
    return pipe(
        prompt="a",
        height=128,
        width=128,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output="images",
        output_type="pt",
    )


def test_its_unet_merges_and_removing_the_patch_restores_it(pipe):
    unpatched = _picture(pipe)
    merged = _picture(tomesd.apply_patch(pipe, ratio=0.5))
    assert set(tomesd.report(pipe).rows) == {"unet"}
    assert merged.isfinite().all()
    assert not torch.equal(merged, unpatched)
    assert torch.equal(_picture(tomesd.remove_patch(pipe)), unpatched)


def test_a_schedule_follows_its_scheduler(pipe):
    """Half of the steps merge."""
    tokens = []
    layer = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].ff
    layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    _picture(tomesd.apply_patch(pipe, ratio=tomesd.RatioSchedule.last(0.5, since=0.5)))
    # Two passes in each step, with and without the prompt.
    assert tokens == [64] * 4 + [32] * 4


def test_its_transformer_is_found():
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(transformer=FLUX.build())
    tomesd.apply_patch(pipe, ratio=0.5)
    FLUX.call(pipe.transformer)
    assert set(tomesd.report(pipe).rows) == {"transformer"}


def test_it_is_refused_before_its_models_are_loaded():
    empty = FluxAutoBlocks().init_pipeline()
    with pytest.raises(TypeError, match=r"got a FluxModularPipeline.*load_components\(\)"):
        tomesd.apply_patch(empty)
