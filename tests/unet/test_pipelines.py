"""Merging works in the pipelines that people use, whatever they are set to."""

from itertools import product

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_pipelines import (
    build_pipeline,
    sample,
    scheduler,
    sd_components,
    sd_pipeline,
    sdxl_components,
    sdxl_pipeline,
)
from tests.support.tiny_unets import controlnet, predict, sd_unet

SIZE = {"height": 80, "width": 112}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((112, 80))
PAPER = {"preset": "paper"}
MASK = Image.linear_gradient("L").rotate(90).resize((112, 80))


def _merges(pipe, expected: set[str], settings: dict, **call) -> None:
    """What a user relies on: it runs, merges in the models expected, repeats, and comes off."""
    before = sample(pipe, **call)
    tomesd.apply_patch(pipe, ratio=0.5, **settings)
    patched = sample(pipe, **call)
    assert patched.shape == before.shape
    assert patched.isfinite().all()
    assert not torch.equal(patched, before)
    assert torch.equal(sample(pipe, **call), patched)
    merging = tomesd.report(pipe).rows
    assert set(merging) == expected
    assert all(any(row.merged < row.tokens for row in rows) for rows in merging.values())
    tomesd.remove_patch(pipe)
    assert torch.equal(sample(pipe, **call), before)


def _text_to_image():
    return sd_pipeline(), {"unet"}, SIZE


def _image_to_image():
    components = sd_components() | {"requires_safety_checker": False}
    call = {"image": PICTURE, "strength": 1.0}
    return build_pipeline(StableDiffusionImg2ImgPipeline, components), {"unet"}, call


def _inpaint(channels: int):
    components = sd_components(sd_unet(in_channels=channels)) | {"requires_safety_checker": False}
    call = SIZE | {"image": PICTURE, "mask_image": MASK, "strength": 1.0}
    return build_pipeline(StableDiffusionInpaintPipeline, components), {"unet"}, call


def _inpaint_4():
    return _inpaint(4)


def _inpaint_9():
    return _inpaint(9)


def _controlnet():
    components = sd_components()
    components |= {"controlnet": controlnet(components["unet"]), "requires_safety_checker": False}
    pipe = build_pipeline(StableDiffusionControlNetPipeline, components)
    return pipe, {"unet", "controlnet"}, {"image": PICTURE}


def _two_controlnets():
    components = sd_components()
    nets = [controlnet(components["unet"], seed) for seed in (1, 2)]
    components |= {"controlnet": nets, "requires_safety_checker": False}
    pipe = build_pipeline(StableDiffusionControlNetPipeline, components)
    expected = {"unet", "controlnet.nets.0", "controlnet.nets.1"}
    return pipe, expected, {"image": [PICTURE, PICTURE]}


def _sdxl():
    return sdxl_pipeline(), {"unet"}, SIZE


def _sdxl_image_to_image():
    components = sdxl_components() | {"add_watermarker": False}
    call = {"image": PICTURE, "strength": 1.0}
    return build_pipeline(StableDiffusionXLImg2ImgPipeline, components), {"unet"}, call


def _sdxl_inpaint():
    components = sdxl_components() | {"add_watermarker": False}
    call = SIZE | {"image": PICTURE, "mask_image": MASK, "strength": 0.99}
    return build_pipeline(StableDiffusionXLInpaintPipeline, components), {"unet"}, call


def _sdxl_controlnet():
    components = sdxl_components() | {"add_watermarker": False}
    components |= {"controlnet": controlnet(components["unet"])}
    pipe = build_pipeline(StableDiffusionXLControlNetPipeline, components)
    return pipe, {"unet", "controlnet"}, {"image": PICTURE}


def _upscaler():
    unet = sd_unet(
        in_channels=7,
        num_class_embeds=1000,
        only_cross_attention=(True, False, False),
        use_linear_projection=True,
    )
    components = sd_components(unet) | {"low_res_scheduler": scheduler()}
    del components["safety_checker"], components["feature_extractor"]
    pipe = build_pipeline(StableDiffusionUpscalePipeline, components)
    return pipe, {"unet"}, {"image": PICTURE.resize((14, 10)), "noise_level": 20}


PIPELINES = [
    _text_to_image,
    _image_to_image,
    _inpaint_4,
    _inpaint_9,
    _controlnet,
    _two_controlnets,
    _sdxl,
    _sdxl_image_to_image,
    _sdxl_inpaint,
    _sdxl_controlnet,
    _upscaler,
]


# A pipeline's kind is about what its models are called with, a setting about what is in them: each
# UNet and the ControlNets with all settings.
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *product(PIPELINES, [{}]),
        *product([_text_to_image, _sdxl_controlnet, _upscaler], [{"merge_queries": False}, PAPER]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_it_works_in_the_pipeline(make, settings):
    pipe, expected, call = make()
    _merges(pipe, expected, settings, **call)


def test_it_works_up_to_the_pixels():
    for pipe in (sd_pipeline(), sdxl_pipeline()):
        tomesd.apply_patch(pipe)
        image = sample(pipe, output_type="pil", **SIZE)[0]
        assert image.size == (112, 80)


SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


# What is drawn depends on the timestep, which two schedulers count as integers and as floats; one
# of them, PNDM, has one of them twice.
@pytest.mark.parametrize(
    ("scheduler_class", "settings"),
    [
        *product(SCHEDULERS, [{"use_rand": True}]),
        *product([EulerDiscreteScheduler, PNDMScheduler], [{}, {"method": "prune"}]),
    ],
)
def test_it_works_with_the_scheduler(scheduler_class, settings):
    pipe = sd_pipeline()
    config = pipe.scheduler.config
    extra = {"skip_prk_steps": True} if scheduler_class is PNDMScheduler else {}
    pipe.scheduler = scheduler_class.from_config(config, **extra)
    _merges(pipe, {"unet"}, settings, num_inference_steps=3, **SIZE)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_it_works_with_any_batch_size_with_and_without_guidance(batch, guidance):
    pipe = sd_pipeline()
    prompts = ["a cat", "a dog", "a cow"][:batch]
    call = SIZE | {"prompt": prompts, "guidance_scale": guidance}
    assert len(sample(pipe, **call)) == batch
    _merges(pipe, {"unet"}, {}, **call)


def test_pictures_of_a_batch_do_not_depend_on_their_neighbours():
    pipe = tomesd.apply_patch(sd_pipeline(), ratio=0.5)
    noise = torch.randn(3, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    together = sample(pipe, ["a cat", "a dog", "a cow"], latents=noise)
    for i, prompt in enumerate(["a cat", "a dog", "a cow"]):
        alone = sample(pipe, prompt, latents=noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("sy", "sx"), [(2, 2), (3, 2), (1, 4), (50, 50)])
@pytest.mark.parametrize("settings", [{}, {"use_rand": True}, {"partition": "alternating"}])
def test_it_works_for_sizes_that_stride_and_downsampling_do_not_divide(sy, sx, settings):
    unet = tomesd.apply_patch(sd_unet(), sy=sy, sx=sx, max_downsample=8, **settings)
    for h, w in [(10, 14), (7, 9), (16, 8), (5, 16), (3, 3), (1, 1)]:
        latents = predict(unet, h=h, w=w)
        assert latents.shape == (2, 4, h, w)
        assert latents.isfinite().all()


def test_sizes_may_change_from_picture_to_picture():
    pipe, fresh = tomesd.apply_patch(sd_pipeline()), sd_pipeline()
    for h, w in [(10, 14), (14, 10), (8, 8), (10, 14)]:
        call = {"height": 8 * h, "width": 8 * w}
        with tomesd.patched(fresh):
            expected = sample(fresh, **call)
        assert torch.equal(sample(pipe, **call), expected)


def test_unet_and_controlnet_are_both_patched_and_both_restored():
    pipe, _, _ = _two_controlnets()
    tomesd.apply_patch(pipe, ratio=0.5)
    nets = [pipe.unet, *pipe.controlnet.nets]
    assert all(count_hooks(net) > 0 for net in nets)
    tomesd.remove_patch(pipe)
    assert all(count_hooks(net) == 0 for net in nets)


def test_merging_in_the_controlnet_alone_changes_the_picture():
    pipe, _, call = _controlnet()
    before = sample(pipe, **call)
    with tomesd.patched(pipe.controlnet, ratio=0.5):
        assert not torch.equal(sample(pipe, **call), before)
    assert torch.equal(sample(pipe, **call), before)


def test_a_controlnet_in_guess_mode_works():
    pipe, expected, call = _controlnet()
    _merges(pipe, expected, {}, guess_mode=True, **call)


def test_pipelines_that_share_a_unet_share_its_patch():
    pipe = sd_pipeline()
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    tomesd.apply_patch(pipe)
    assert tomesd.report(other).rows.keys() == {"unet"}
    tomesd.remove_patch(other)
    assert count_hooks(pipe.unet) == 0


def test_no_other_part_of_a_pipeline_is_touched():
    pipe = tomesd.apply_patch(sdxl_pipeline(), preset="paper")
    others = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert [count_hooks(part) for part in others] == [0, 0, 0]
