"""What diffusers promises of its pipelines still holds while tokens merge."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import tomesd
from tests.support.pipelines import FAMILIES, build, call
from tests.support.tiny_pipelines import sample, sd_pipeline

SD, SDXL, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"
SD3, PIXART, WAN = "StableDiffusion3Pipeline", "PixArtSigmaPipeline", "WanPipeline"


def _patched(name: str):
    return tomesd.apply_patch(build(name, FAMILIES[name]))


def _call(pipe, name: str, **more):
    family = FAMILIES[name]
    return call(pipe, name, family, family.sizes[1], **more)


# Flux matches all images of a batch together, as the docs say.
@pytest.mark.parametrize("name", [SD, SDXL, SD3, PIXART, WAN])
def test_images_of_a_batch_are_those_of_single_calls(name):
    pipe = _patched(name)
    prompts, shape = ["a cat", "a dog"], _call(pipe, name).shape
    noise = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1))
    together = _call(pipe, name, prompt=prompts, latents=noise)
    # The helper takes the first of a batch of videos or images; whole tensors have all of them.
    assert len(together) == 2
    for index, prompt in enumerate(prompts):
        alone = _call(pipe, name, prompt=prompt, latents=noise[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [SD, FLUX, SD3])
def test_several_images_of_a_prompt_are_as_many_prompts(name):
    pipe = _patched(name)
    several = _call(pipe, name, num_images_per_prompt=2)
    assert torch.equal(several, _call(pipe, name, prompt=["a cat", "a cat"]))


@pytest.mark.parametrize("name", [SD, FLUX, WAN])
def test_callbacks_read_and_change_latents(name):
    pipe, seen = _patched(name), []

    def at_step_end(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {"latents": 0 * tensors["latents"]} if step == 1 else tensors

    plain = _call(pipe, name)
    assert not _call(pipe, name, callback_on_step_end=at_step_end).any()
    assert len(seen) == 2
    assert torch.equal(seen[-1], plain)


@pytest.mark.parametrize("name", [SD, FLUX, WAN])
def test_an_interrupted_run_leaves_nothing_behind(name):
    pipe = _patched(name)
    plain = _call(pipe, name)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    def fail(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    _call(pipe, name, callback_on_step_end=stop)
    assert torch.equal(_call(pipe, name), plain)
    with pytest.raises(KeyboardInterrupt):
        _call(pipe, name, callback_on_step_end=fail)
    assert torch.equal(_call(pipe, name), plain)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        (SD, EulerDiscreteScheduler),
        (SDXL, UniPCMultistepScheduler),
        (SD3, FlowMatchHeunDiscreteScheduler),
    ],
)
def test_the_scheduler_may_change_while_patched(name, scheduler):
    pipe, fresh = _patched(name), build(name, FAMILIES[name])
    _call(pipe, name)
    for each in (pipe, fresh):
        each.scheduler = scheduler.from_config(each.scheduler.config)
    tomesd.apply_patch(fresh)
    assert torch.equal(_call(pipe, name), _call(fresh, name))


def test_attention_slicing_gives_the_same_image():
    for when in ("before", "after"):
        pipe = sd_pipeline()
        expected = sample(tomesd.apply_patch(sd_pipeline()))
        if when == "before":
            pipe.enable_attention_slicing(1)
        tomesd.apply_patch(pipe)
        if when == "after":
            pipe.enable_attention_slicing(1)
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-4, atol=1e-4)
        pipe.disable_attention_slicing()
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-4, atol=1e-4)


def test_a_patched_pipeline_is_saved_and_loaded_without_its_patch(tmp_path):
    pipe = tomesd.apply_patch(sd_pipeline())
    merged = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(tomesd.apply_patch(loaded)), merged)
    tomesd.remove_patch(loaded)
    assert torch.equal(sample(loaded), sample(tomesd.remove_patch(pipe)))


def test_blocks_that_a_controlnet_shares_merge_in_their_transformer_alone():
    """Z-Image's ControlNet refines the image with the transformer's blocks, before it does."""
    name = "ZImageControlNetPipeline"
    pipe, family = build(name, FAMILIES[name]), FAMILIES[name]
    tokens = []
    block = pipe.transformer.noise_refiner[0]
    block.attention.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    call(pipe, name, family, (6, 6))
    whole = set(tokens)
    tomesd.apply_patch(pipe, preset="steady")
    first = call(pipe, name, family, (6, 6))
    # Nothing of a pass before counts: at another size, and in the first step.
    call(pipe, name, family, (5, 7))
    tokens.clear()
    assert torch.equal(call(pipe, name, family, (6, 6)), first)
    in_controlnet, in_transformer = tokens[0::2], tokens[1::2]
    assert set(in_controlnet) == whole
    assert max(in_transformer) < min(whole)
