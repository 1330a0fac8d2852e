"""A patch follows the clone of a model that got it; the other clones of the model never merge."""

import copy

import pytest
import torch

import tomesd
from tests.support.stand_in_comfyui import ForgePatcher, ModelPatcher, build, sample
from tomesd.diffusion import clones


@pytest.fixture(params=[ModelPatcher, ForgePatcher])
def patcher(request):
    return build(request.param)


def _hooks(patcher) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in patcher.model.modules()
    )


def test_only_the_clone_with_the_patch_and_its_clones_merge(patcher):
    plain = sample(patcher)
    clone = patcher.clone()
    assert tomesd.apply_patch(clone, ratio=0.5) is clone
    merged = sample(clone)
    assert not torch.equal(merged, plain)
    for other, want in ((patcher, plain), (clone, merged), (clone.clone(), merged)):
        assert torch.equal(sample(other), want)
    again = clone.clone()
    tomesd.remove_patch(again)
    assert torch.equal(sample(again), plain)
    assert torch.equal(sample(clone), merged)
    tomesd.remove_patch(clone)
    assert torch.equal(sample(clone), plain)
    assert _hooks(patcher) == 0


def test_random_merging_leaves_the_next_clone_alone(patcher):
    """Its hook on the model itself is removed while the next clone calls the model."""
    plain = sample(patcher, steps=1)
    clone = tomesd.apply_patch(patcher.clone(), method="prune")
    assert not torch.equal(sample(clone, steps=1), plain)
    assert torch.equal(sample(patcher, steps=1), plain)


def test_two_clones_keep_their_own_settings(patcher):
    one = tomesd.apply_patch(patcher.clone(), ratio=0.5)
    other = tomesd.apply_patch(patcher.clone(), ratio=0.25, merge_attn=True)
    first, second = sample(one), sample(other)
    assert not torch.equal(first, second)
    assert torch.equal(sample(one), first)
    assert torch.equal(sample(other), second)


def test_comfyui_leaves_no_hook_on_the_model_after_sampling():
    patcher = build()
    sample(tomesd.apply_patch(patcher.clone(), ratio=0.5))
    assert _hooks(patcher) == 0
    assert not any("tomesd" in name for name in vars(patcher.model.diffusion_model))


def test_copied_options_share_the_model(patcher):
    """ComfyUI and Forge copy options deeply, which must not copy the model."""
    clone = tomesd.apply_patch(patcher.clone())
    copied = clone.clone()
    copied.model_options = copy.deepcopy(clone.model_options)
    assert clones.follower_of(copied) is clones.follower_of(clone)


def test_weights_that_are_offloaded_and_replaced_merge_as_before(patcher):
    clone = tomesd.apply_patch(patcher.clone())
    before = sample(clone)
    weights = {name: each.clone() for name, each in patcher.model.state_dict().items()}
    patcher.model.to("meta")
    patcher.model.load_state_dict(weights, assign=True)
    assert torch.equal(sample(clone), before)


@pytest.mark.filterwarnings("ignore:nothing merges")
def test_a_schedule_counts_the_steps_of_the_sampler():
    patcher = build()
    plain = sample(patcher)
    seen = {}
    for since in (0.5, 0.99):
        clone = tomesd.apply_patch(patcher.clone(), tomesd.RatioSchedule.last(0.5, since=since))
        with tomesd.trace(clone) as traced:
            seen[since] = sample(clone)
        assert {group.step for group in traced} == ({2, 3} if since == 0.5 else set())
    assert torch.equal(seen[0.99], plain)


def test_a_schedule_without_the_samplers_steps_is_a_clear_error():
    clone = tomesd.apply_patch(build(ForgePatcher), tomesd.RatioSchedule.last(0.5, since=0.5))
    with pytest.raises(ValueError, match="transformer_options must have sample_sigmas"):
        sample(clone)


def test_report_trace_and_patched_take_a_clone(patcher):
    clone = patcher.clone()
    with pytest.raises(ValueError, match="must be patched"):
        tomesd.report(clone)
    plain = sample(clone)
    with tomesd.patched(clone, ratio=0.5):
        merged = sample(clone)
        assert "1/1 input_blocks.1" in str(tomesd.report(clone))
        with tomesd.trace(clone) as traced:
            assert torch.equal(sample(clone), merged)
        assert traced[0].grid == (10, 14)
        with tomesd.patched(clone, ratio=0.25):
            assert not torch.equal(sample(clone), merged)
        assert torch.equal(sample(clone), merged)
    assert torch.equal(sample(clone), plain)


def test_the_wrapper_function_of_another_extension_runs_inside_and_stays():
    patcher, calls = build(ForgePatcher), []

    def function(apply_model, call):
        calls.append(call["cond_or_uncond"])
        return apply_model(call["input"], call["timestep"], **call["c"])

    patcher.set_model_unet_function_wrapper(function)
    plain = sample(patcher)
    tomesd.apply_patch(patcher)
    tomesd.apply_patch(patcher)
    assert not torch.equal(sample(patcher), plain)
    assert len(calls) == 8
    tomesd.remove_patch(patcher)
    assert patcher.model_options["model_function_wrapper"] is function


def test_forges_model_object_is_taken_by_the_clone_in_it():
    engine = type("ForgeDiffusionEngine", (), {})()
    engine.forge_objects = type("ForgeObjects", (), {"unet": build(ForgePatcher)})()
    plain = sample(engine.forge_objects.unet)
    tomesd.apply_patch(engine, ratio=0.5)
    assert not torch.equal(sample(engine.forge_objects.unet), plain)
    tomesd.remove_patch(engine)
    assert torch.equal(sample(engine.forge_objects.unet), plain)


def test_a_compiled_model_is_refused():
    """Compiled code would be run for the other clones too."""
    patcher = build()
    clone = tomesd.apply_patch(patcher.clone())
    clone.add_wrapper_with_key("apply_model", "torch.compile", lambda run, *args: run(*args))
    with pytest.raises(ValueError, match=r"must not be compiled here, got one with torch\.compile"):
        sample(clone)


def test_a_module_that_is_patched_by_itself_is_refused(patcher):
    clone = tomesd.apply_patch(patcher.clone())
    tomesd.apply_patch(patcher.model.diffusion_model)
    with pytest.raises(ValueError, match="must not be patched itself while"):
        sample(clone)
    tomesd.remove_patch(patcher.model.diffusion_model)
    sample(clone)
