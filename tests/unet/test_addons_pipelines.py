"""Pipelines built on a UNet with inputs of its own: it merges, and what they add still works."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
    UNetControlNetXSModel,
)
from PIL import Image

import tomesd
from tests.support.recorders import inputs_of
from tests.support.tiny_model import WIDTH
from tests.support.tiny_pipelines import (
    build_pipeline,
    sample,
    scheduler,
    sd_components,
    sd_pipeline,
    sdxl_components,
    sdxl_pipeline,
)
from tests.support.tiny_unets import controlnet, sd_unet, sdxl_unet

SIZE = {"height": 80, "width": 112}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((112, 80))
OTHER = PICTURE.rotate(180)
MASK = PICTURE.convert("L")


@dataclass
class Case:
    """A pipeline, what it is called with, and another value of what it adds.

    batch: what its UNet gets at once for one picture.
    """

    make: Callable
    call: dict
    change: dict
    batch: int = 2


def _sd(pipeline, *left_out: str, components: dict | None = None, **unet):
    parts = sd_components(sd_unet(**unet)) | (components or {})
    if left_out:
        parts = {name: part for name, part in parts.items() if name not in left_out}
    else:
        parts["requires_safety_checker"] = False
    return build_pipeline(pipeline, parts)


def _image_to_image():
    return _sd(StableDiffusionImg2ImgPipeline)


def _inpaint():
    return _sd(StableDiffusionInpaintPipeline, in_channels=9)


def _instruct():
    return _sd(StableDiffusionInstructPix2PixPipeline, in_channels=8)


def _depth():
    estimator = {"depth_estimator": None, "feature_extractor": None}
    return _sd(
        StableDiffusionDepth2ImgPipeline, "safety_checker", components=estimator, in_channels=5
    )


def _upscaler():
    # As the x4 upscaler: no self-attention but at the coarsest level with attention.
    return _sd(
        StableDiffusionUpscalePipeline,
        "safety_checker",
        "feature_extractor",
        components={"low_res_scheduler": scheduler()},
        in_channels=7,
        num_class_embeds=1000,
        only_cross_attention=(True, False, False),
    )


def _latent_consistency():
    parts = {"scheduler": LCMScheduler.from_config(scheduler().config)}
    return _sd(LatentConsistencyModelPipeline, components=parts, time_cond_proj_dim=8)


def _turbo():
    pipe = sd_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    return pipe


def _turbo_xl():
    pipe = sdxl_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    return pipe


def _adapter(seed: int = 0) -> T2IAdapter:
    torch.manual_seed(seed)
    return T2IAdapter(3, (16, 32, 32), num_res_blocks=1)


def _t2i_adapter():
    return _sd(StableDiffusionAdapterPipeline, components={"adapter": _adapter()})


def _two_t2i_adapters():
    adapters = {"adapter": [_adapter(seed) for seed in (1, 2)]}
    return _sd(StableDiffusionAdapterPipeline, components=adapters)


def _t2i_adapter_xl():
    torch.manual_seed(0)
    adapter = T2IAdapter(3, (16, 16, 32, 32), 1, 16, "full_adapter_xl")
    return build_pipeline(
        StableDiffusionXLAdapterPipeline, sdxl_components() | {"adapter": adapter}
    )


def _refiner():
    unet = sdxl_unet(
        cross_attention_dim=WIDTH,
        projection_class_embeddings_input_dim=5 * 8 + WIDTH,
    )
    parts = sdxl_components() | {"unet": unet, "text_encoder": None, "tokenizer": None}
    parts |= {"requires_aesthetics_score": True, "add_watermarker": False}
    return build_pipeline(StableDiffusionXLImg2ImgPipeline, parts)


def _two_controlnets():
    parts = sd_components()
    nets = [controlnet(parts["unet"], seed) for seed in (1, 2)]
    parts |= {"controlnet": nets, "requires_safety_checker": False}
    return build_pipeline(StableDiffusionControlNetPipeline, parts)


def _embeds(seed: int) -> dict:
    normal = torch.randn(2, 1, 12, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"prompt": None, "prompt_embeds": normal[0], "negative_prompt_embeds": normal[1]}


def _masked_text():
    pipe = sd_pipeline()
    pipe.text_encoder.config.use_attention_mask = True
    return pipe


DEPTH = torch.linspace(0, 1, 140).view(1, 10, 14)
CASES = {
    "image to image": Case(_image_to_image, {"image": PICTURE, "strength": 0.6}, {"image": OTHER}),
    "inpainting with 9 channels": Case(
        _inpaint,
        SIZE | {"image": PICTURE, "mask_image": MASK, "strength": 1.0},
        {"mask_image": MASK.rotate(180)},
    ),
    "instruct-pix2pix": Case(
        _instruct,
        {"image": PICTURE, "image_guidance_scale": 1.5},
        {"image_guidance_scale": 3.0},
        batch=3,
    ),
    "depth": Case(
        _depth,
        {"image": PICTURE, "depth_map": DEPTH, "strength": 1.0},
        {"depth_map": DEPTH.flip(1)},
    ),
    "upscaler": Case(
        _upscaler,
        {"image": PICTURE.resize((14, 10)), "noise_level": 20},
        {"noise_level": 300},
    ),
    "latent consistency": Case(
        _latent_consistency, SIZE | {"guidance_scale": 4.0}, {"guidance_scale": 8.0}, batch=1
    ),
    "turbo without guidance": Case(
        _turbo, SIZE | {"guidance_scale": 0.0, "num_inference_steps": 1}, {"prompt": "a dog"}, 1
    ),
    "SDXL turbo": Case(
        _turbo_xl, SIZE | {"guidance_scale": 0.0, "num_inference_steps": 1}, {"prompt": "a dog"}, 1
    ),
    "T2I-Adapter": Case(_t2i_adapter, SIZE | {"image": PICTURE}, {"image": OTHER}),
    "two T2I-Adapters": Case(
        _two_t2i_adapters,
        SIZE | {"image": [PICTURE, OTHER], "adapter_conditioning_scale": [0.5, 0.5]},
        {"adapter_conditioning_scale": [0.2, 0.8]},
    ),
    "T2I-Adapter of SDXL": Case(_t2i_adapter_xl, SIZE | {"image": PICTURE}, {"image": OTHER}),
    "SDXL refiner": Case(_refiner, {"image": PICTURE, "strength": 0.6}, {"aesthetic_score": 1.0}),
    "two ControlNets": Case(
        _two_controlnets,
        {"image": [PICTURE, OTHER]},
        {"controlnet_conditioning_scale": [0.2, 0.8]},
    ),
    "prompts as embeddings": Case(sd_pipeline, SIZE | _embeds(0), _embeds(1)),
    "a text encoder that hides padding": Case(_masked_text, SIZE, {"prompt": "a black cat"}),
}


def _lengths(pipe, call: dict) -> list[tuple[int, int]]:
    """The batch and the queries of every self-attention of the UNet."""
    with inputs_of(pipe.unet, "attn1") as seen:
        sample(pipe, **call)
    return seen


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_the_pipeline_merges_and_removing_the_patch_restores_it(case):
    pipe = case.make()
    before, whole = sample(pipe, **case.call), _lengths(pipe, case.call)
    finest = max(n for _, n in whole)
    tomesd.apply_patch(pipe, ratio=0.5, preset="steady")
    after = sample(pipe, **case.call)
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    assert torch.equal(sample(pipe, **case.call), after)
    # Half of the tokens are left at the finest level, and all at the others.
    left = [(b, finest - finest // 2 if n == finest else n) for b, n in whole]
    assert _lengths(pipe, case.call) == left
    assert {b for b, _ in left} == {case.batch}
    tomesd.remove_patch(pipe)
    assert torch.equal(sample(pipe, **case.call), before)


def test_what_it_adds_still_has_its_effect(case):
    pipe = tomesd.apply_patch(case.make())
    expected = sample(pipe, **case.call)
    other = sample(pipe, **case.call | case.change)
    assert other.isfinite().all()
    assert not torch.equal(other, expected)


def test_controlnet_xs_is_refused_by_name():
    # Its blocks are interleaved with those of the UNet that it holds.
    model = UNetControlNetXSModel(
        block_out_channels=(8, 16),
        ctrl_block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(8, 8),
        cross_attention_dim=8,
        num_attention_heads=2,
        ctrl_num_attention_heads=2,
    )
    with pytest.raises(TypeError, match="must not be a UNetControlNetXSModel: its transformers"):
        tomesd.apply_patch(model)
