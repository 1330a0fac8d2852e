"""Ratios by level and over the steps of a pipeline do what they say, compiled too."""

import copy
import gc
import pickle
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch._dynamo.testing import CompileCounterWithBackend

import tomesd
from tests.support.slow import slow
from tests.support.tiny_pipelines import build_pipeline, sd_components
from tests.support.tiny_unets import predict, sd_unet, unet_inputs
from tomesd import DiffusionSettings, RatioSchedule
from tomesd.hooks import PATCH

STEPS = 10
FIRST = RatioSchedule.first(0.5, until=0.4)
# A single transformer block, so that it compiles in seconds.
ONE_BLOCK = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


def _pipe(scheduler=EulerDiscreteScheduler, unet=None) -> StableDiffusionPipeline:
    pipe = build_pipeline(StableDiffusionPipeline, sd_components(unet))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe, size: int = 64, **kwargs):
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    if not isinstance(pipe, StableDiffusionImg2ImgPipeline):
        given |= {"height": size, "width": size}
    return pipe("a cat", output_type="np", **given | kwargs).images


def _watch(pipe) -> list[int]:
    """How many tokens the first block's self-attention sees, step by step."""
    seen: list[int] = []
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (FIRST, [32] * 4 + [64] * 6),
        (RatioSchedule.ramp(0.5, 0.0, pieces=2), [32] * 5 + [64] * 5),
        (lambda progress: 0.25 if progress > 0.5 else 0.5, [32] * 5 + [48] * 5),
    ],
    ids=["first", "ramp", "function"],
)
def test_each_step_merges_as_the_schedule_says_in_every_picture(scheduler, ratio, expected):
    pipe = tomesd.apply_patch(_pipe(scheduler), ratio=ratio)
    seen = _watch(pipe)
    first = _draw(pipe)
    assert seen == expected
    seen.clear()
    assert (_draw(pipe) == first).all()
    assert seen == expected


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_a_picture_of_so_few_steps_that_none_merges_warns_once(scheduler, recwarn):
    pipe = tomesd.apply_patch(_pipe(scheduler), ratio=RatioSchedule.last(0.5, since=0.2))
    _draw(pipe)
    assert not [each for each in recwarn if "nothing merges" in str(each.message)]
    with pytest.warns(UserWarning, match="nothing merges in UNet2D.*ratio is 0 in each .* 1 in"):
        _draw(pipe, num_inference_steps=1)
    recwarn.clear()
    _draw(pipe, num_inference_steps=1)
    assert not [each for each in recwarn if "nothing merges" in str(each.message)]


def test_image_to_image_that_begins_after_all_that_merges_warns():
    pipe = tomesd.apply_patch(_pipe(), ratio=FIRST)
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="nothing merges"):
        _draw(again, image=torch.rand(1, 3, 64, 64), strength=0.4)


def test_a_constant_schedule_is_a_ratio():
    pipe = tomesd.apply_patch(_pipe(), ratio=0.5, preset="steady")
    expected = _draw(pipe)
    tomesd.apply_patch(pipe, ratio=RatioSchedule(((0.5, 0.5), (1, 0.5))))
    assert (_draw(pipe) == expected).all()


def test_a_scheduler_that_is_put_in_later_is_followed():
    pipe = tomesd.apply_patch(_pipe(DDIMScheduler), ratio=FIRST)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = _watch(pipe)
    _draw(pipe)
    assert seen == [32] * 4 + [64] * 6


def test_image_to_image_begins_where_its_strength_says():
    pipe = tomesd.apply_patch(_pipe(), ratio=FIRST)
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    seen = _watch(again)
    _draw(again, image=torch.rand(1, 3, 64, 64), strength=0.8)
    # The first two of ten steps are left out.
    assert seen == [32] * 2 + [64] * 6


def test_a_picture_that_was_interrupted_does_not_shift_the_next():
    pipe = tomesd.apply_patch(_pipe(), ratio=FIRST)

    def stop(pipe, step, timestep, kwargs):
        if step == 6:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        _draw(pipe, callback_on_step_end=stop)
    seen = _watch(pipe)
    _draw(pipe)
    assert seen == [32] * 4 + [64] * 6


def test_a_copied_pipeline_follows_its_own_scheduler():
    pipe = tomesd.apply_patch(_pipe(), ratio=FIRST)
    copied = copy.deepcopy(pipe)
    seen = _watch(copied)
    pipe.scheduler.set_timesteps(3)
    pipe.scheduler.set_begin_index(2)
    _draw(copied)
    assert seen == [32] * 4 + [64] * 6


def test_a_models_pickle_has_its_schedule_and_not_its_pipeline():
    pipe = tomesd.apply_patch(_pipe(), ratio=0.5)
    constant = len(pickle.dumps(pipe.unet))
    tomesd.apply_patch(pipe, ratio=FIRST)
    text = pickle.dumps(pipe.unet)
    assert len(text) < constant + 100_000
    pipe.unet = pickle.loads(text)
    seen = _watch(pipe)
    # It counts by a scheduler of its own, the one that came with it.
    (hook,) = [each for each in pipe.unet._forward_pre_hooks.values() if hasattr(each, "__self__")]
    pipe.scheduler = hook.__self__.plan.steps.scheduler
    _draw(pipe)
    assert seen == [32] * 4 + [64] * 6


def test_a_pickled_pipeline_follows_its_own_scheduler():
    pipe = tomesd.apply_patch(_pipe(), ratio=FIRST)
    again = pickle.loads(pickle.dumps(pipe))
    again.set_progress_bar_config(disable=True)
    seen = _watch(again)
    _draw(again)
    assert seen == [32] * 4 + [64] * 6


def test_a_model_does_not_keep_its_pipeline():
    pipe = tomesd.apply_patch(_pipe(), ratio=FIRST)
    unet, kept = pipe.unet, weakref.ref(pipe)
    del pipe
    gc.collect()
    assert kept() is None
    assert tomesd.report(unet)


def test_levels_merge_as_they_are_named_and_no_others():
    unet = tomesd.apply_patch(sd_unet(), ratio={1: 0.25, 4: 0.5})
    predict(unet, h=16, w=16)
    (rows,) = tomesd.report(unet).rows.values()
    left = {row.where: row.merged for row in rows}
    assert left == {
        "1/1 down_blocks.0": 192,
        "1/2 down_blocks.1": 64,
        "1/4 mid_block": 8,
        "1/2 up_blocks.1": 64,
        "1/1 up_blocks.2": 192,
    }


def test_levels_may_have_schedules_of_their_own_and_the_report_names_them():
    pipe = tomesd.apply_patch(_pipe(), ratio={1: FIRST, 2: 0.25})
    _draw(pipe)
    (rows,) = tomesd.report(pipe).rows.values()
    notes = {row.where: row.note for row in rows}
    assert notes["1/1 down_blocks.0"] == "ratio 0.5, 0"
    assert notes["1/2 down_blocks.1"] == "ratio 0.25, 0.25"
    assert notes["1/4 mid_block"] == "ratio is 0"


def test_with_min_tokens_only_the_larger_second_pass_merges():
    # The first pass has 64 tokens at the finest level, the second, twice as large, 256.
    pipe = tomesd.apply_patch(_pipe(), ratio=0.5, min_tokens=256)
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    seen = _watch(pipe)
    with pytest.warns(UserWarning, match="fewer than min_tokens=256"):
        small = torch.tensor(_draw(pipe)).movedim(-1, 1)
    assert seen == [64] * STEPS
    seen.clear()
    large = torch.nn.functional.interpolate(small, scale_factor=2)
    _draw(again, image=large, strength=0.5)
    assert seen == [128] * (STEPS // 2)


def test_removing_a_schedule_leaves_nothing():
    pipe = _pipe()
    before = _draw(pipe)
    tomesd.apply_patch(pipe, ratio=RatioSchedule.ramp(0.6, 0.1))
    assert (_draw(pipe) != before).any()
    tomesd.remove_patch(pipe)
    assert (_draw(pipe) == before).all()


@slow
@pytest.mark.parametrize(
    ("in_place", "scheduler"),
    [(False, EulerDiscreteScheduler), pytest.param(True, DDIMScheduler, marks=slow)],
)
def test_a_compiled_unet_is_compiled_once_for_each_ratio(in_place, scheduler):
    torch.compiler.reset()
    pipe = _pipe(scheduler, sd_unet(**ONE_BLOCK))
    tomesd.apply_patch(pipe, ratio=RatioSchedule.ramp(0.6, 0.2, pieces=3))
    expected = _draw(pipe, guidance_scale=1.0)
    counter = CompileCounterWithBackend("eager")
    if in_place:
        pipe.unet.compile(backend=counter, fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    for _ in range(2):
        got = _draw(pipe, guidance_scale=1.0)
        assert abs(got - expected).max() < 1e-4
        assert counter.frame_count == 3


@pytest.mark.parametrize(
    ("target", "ratio", "error", "words"),
    [
        ("unet", FIRST, TypeError, r"a schedule needs apply_patch\(pipe, ...\), got a UNet2DCond"),
        ("pipe", {1: 0.5, 8: 0.5}, ValueError, "levels among 1, 2, 4, got 8"),
        ("pipe", {1: 0.9}, ValueError, "ratio must be at most 0.75, got 0.9"),
        ("pipe", RatioSchedule.first(-0.1, 0.5), ValueError, "at least 0 and below 1, got -0.1"),
    ],
)
def test_an_invalid_ratio_is_refused_and_nothing_is_patched(target, ratio, error, words):
    pipe = _pipe()
    with pytest.raises(error, match=words):
        tomesd.apply_patch(pipe if target == "pipe" else pipe.unet, ratio=ratio)
    with pytest.raises(ValueError, match="patched"):
        tomesd.report(pipe)


def test_late_merges_at_the_finest_level_and_where_it_pays_and_needs_a_pipeline():
    late = {"max_downsample": 8, "only_where_it_pays": "coarser"}
    pipe = tomesd.apply_patch(_pipe(), preset="late")
    settings = getattr(pipe.unet, PATCH).settings
    assert settings == DiffusionSettings(settings.ratio, **late)
    assert settings.ratio.pieces == ((0.2, 0.0), (1.0, 0.5))
    # A ratio that changes by itself stays as it is, at levels of its own too.
    tomesd.apply_patch(pipe, {1: FIRST, 2: 0.25}, preset="late")
    ratio = getattr(pipe.unet, PATCH).settings.ratio
    assert (ratio[1], ratio[2].pieces) == (FIRST, ((0.2, 0.0), (1.0, 0.25)))
    with pytest.raises(TypeError, match=r"a schedule needs apply_patch\(pipe, \.\.\.\)"):
        tomesd.apply_patch(sd_unet(), preset="late")


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_a_pipeline_merges_late_by_default_and_as_it_is_told_otherwise(scheduler, ratio):
    pipe = tomesd.apply_patch(_pipe(scheduler), ratio)
    settings = _settings(pipe)
    assert settings == _settings(tomesd.apply_patch(pipe, ratio, preset="late"))
    assert settings.ratio.pieces == ((0.2, 0.0), (1.0, 0.5))
    assert (settings.max_downsample, settings.only_where_it_pays) == (8, "coarser")
    steady = DiffusionSettings(ratio=0.5)
    assert _settings(tomesd.apply_patch(pipe, ratio, preset="steady")) == steady
    assert _settings(tomesd.apply_patch(pipe, ratio, seed=0)) == steady
    tomesd.remove_patch(pipe)
    tomesd.apply_patch(pipe.unet, ratio)
    assert _settings(pipe) == steady
    schedule = RatioSchedule.last(0.5, since=0.4)
    assert _settings(tomesd.apply_patch(pipe, schedule)) == DiffusionSettings(ratio=schedule)


def test_a_pipeline_whose_parts_have_schedulers_of_their_own_merges_steadily():
    parts = {"unet": sd_unet(), "scheduler": DDIMScheduler(), "prior_scheduler": DDIMScheduler()}
    combined = SimpleNamespace(components=parts, **parts)
    assert _settings(tomesd.apply_patch(combined, 0.5)) == DiffusionSettings(ratio=0.5)


def test_steps_that_the_scheduler_does_not_take_are_told_once():
    pipe = tomesd.apply_patch(_pipe(), ratio=0.5)
    inputs = unet_inputs(pipe.unet) | {"timestep": torch.tensor(0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            pipe.unet(**inputs)
    with pytest.warns(UserWarning, match="scheduler took no step in 8 calls at timesteps .*steady"):
        pipe.unet(**inputs)


def _settings(pipe) -> DiffusionSettings:
    return getattr(pipe.unet, PATCH).settings


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize(("steps", "whole"), [(1, 0), (2, 1), (4, 1), (10, 2)])
def test_late_leaves_a_fifth_of_the_steps_whole_at_least_one_of_several(scheduler, steps, whole):
    pipe = tomesd.apply_patch(_pipe(scheduler), preset="late", only_where_it_pays=False)
    seen = _watch(pipe)
    _draw(pipe, num_inference_steps=steps)
    assert seen == [64] * whole + [32] * (steps - whole)
