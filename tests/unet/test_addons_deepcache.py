"""DeepCache skips deep levels in most steps; those that it computes merge."""

from typing import Any

import DeepCache
import pytest
import torch

import tomesd
from tests.support.tiny_pipelines import sample, sd_pipeline


def _sample(pipe) -> torch.Tensor:
    return sample(pipe, num_inference_steps=4)


def _enable(pipe) -> Any:
    helper = DeepCache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    return helper


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("settings", [{}, {"preset": "quality"}, {"preset": "paper"}], ids=str)
def test_deepcache_works_with_merging_and_either_may_be_removed(settings, when):
    merged = _sample(tomesd.apply_patch(sd_pipeline(), **settings))
    pipe = sd_pipeline()
    _enable(pipe)
    cached = _sample(pipe)

    pipe = sd_pipeline()
    if when == "before":
        helper = _enable(pipe)
        tomesd.apply_patch(pipe, **settings)
    else:
        tomesd.apply_patch(pipe, **settings)
        helper = _enable(pipe)
    both = _sample(pipe)
    assert both.isfinite().all()
    assert not torch.equal(both, merged)
    assert not torch.equal(both, cached)
    tomesd.remove_patch(pipe)
    assert torch.equal(_sample(pipe), cached)
    tomesd.apply_patch(pipe, **settings)
    helper.disable()
    assert torch.equal(_sample(pipe), merged)


def test_the_steps_that_it_computes_merge_and_the_others_are_skipped():
    pipe = tomesd.apply_patch(sd_pipeline(), preset="steady")
    _enable(pipe)
    lengths: list[int] = []
    first = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    first.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    _sample(pipe)
    # Half of the 256 tokens, in every other of the 4 steps.
    assert lengths == [128, 128]
