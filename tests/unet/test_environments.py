"""Merging goes together with what else people do to a UNet."""

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_pipelines import build_pipeline, sample, sd_components, sd_pipeline
from tests.support.tiny_unets import predict, sd_unet, unet_inputs

EVERYTHING = {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8}
PROCESSORS = [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)]
SETTINGS = [{}, {"prop_attn": False}, {"merge_queries": False}, EVERYTHING]


# Pairs: each setting and each processor in both orders, but not each setting with each of them.
@pytest.mark.parametrize(
    ("processor", "when", "settings"),
    [
        (processor, when, SETTINGS[(index + 2 * (when == "after") + shift) % len(SETTINGS)])
        for index, processor in enumerate(PROCESSORS)
        for when in ("before", "after")
        for shift in (0, 1)
    ],
    ids=lambda value: str(value) if isinstance(value, dict | str) else type(value).__name__,
)
def test_every_stock_attention_processor_gives_the_same_picture(processor, when, settings):
    expected = predict(tomesd.apply_patch(sd_unet(), **settings))
    unet = sd_unet()
    if when == "before":
        unet.set_attn_processor(processor)
    tomesd.apply_patch(unet, **settings)
    if when == "after":
        unet.set_attn_processor(processor)
    torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-5)
    processors = set(unet.attn_processors.values())
    assert processors == {processor}
    assert set(tomesd.remove_patch(unet).attn_processors.values()) == processors


@pytest.mark.parametrize("slices", ["auto", "max", 1])
def test_attention_slicing_gives_the_same_picture(slices):
    pipe = tomesd.apply_patch(sd_pipeline())
    expected = sample(pipe)
    pipe.enable_attention_slicing(slices)
    torch.testing.assert_close(sample(pipe), expected, rtol=0, atol=1e-4)
    pipe.disable_attention_slicing()
    assert torch.equal(sample(pipe), expected)


def test_fused_projections_give_the_same_picture():
    expected = predict(tomesd.apply_patch(sd_unet()))
    unet = sd_unet()
    unet.fuse_qkv_projections()
    torch.testing.assert_close(predict(tomesd.apply_patch(unet)), expected, rtol=0, atol=1e-5)


# Each processor in both precisions, upcast in one of them.
@pytest.mark.parametrize(
    ("processor", "dtype", "upcast_attention"),
    [
        (processor, dtype, (index % 2 == 0) == (dtype == torch.float16))
        for index, processor in enumerate(PROCESSORS)
        for dtype in (torch.float16, torch.bfloat16)
    ],
    ids=lambda value: str(value) if isinstance(value, bool | torch.dtype) else type(value).__name__,
)
def test_half_precision_changes_less_than_half_of_what_merging_does(
    dtype, upcast_attention, processor
):
    unet = sd_unet(upcast_attention=upcast_attention)
    unet.set_attn_processor(processor)
    unpatched = predict(unet)
    full = predict(tomesd.apply_patch(unet, **EVERYTHING))
    half = predict(unet.to(dtype))
    assert half.dtype == dtype
    # More than rounding: of pairs that are about as similar, other ones may merge.
    assert (half.float() - full).abs().mean() < 0.5 * (full - unpatched).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_works_under_autocast(dtype):
    unet = tomesd.apply_patch(sd_unet(), **EVERYTHING)
    full = predict(unet)
    with torch.autocast("cpu", dtype):
        assert (predict(unet).float() - full).abs().max() < 0.1


def test_it_works_in_double_precision():
    full = predict(tomesd.apply_patch(sd_unet(), **EVERYTHING))
    double = predict(tomesd.apply_patch(sd_unet().double(), **EVERYTHING))
    torch.testing.assert_close(double.float(), full, rtol=0, atol=1e-5)


def _offload_whole(pipe) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def _offload_one_by_one(pipe) -> None:
    # What enable_sequential_cpu_offload does to a pipeline's models; itself, it asks for an
    # accelerator's index.
    for model in (pipe.unet, pipe.vae):
        accelerate.cpu_offload(model, torch.device("cpu"))


# Each way in both orders with two settings each, and each setting with both ways.
@pytest.mark.parametrize(
    ("offload", "when", "settings"),
    [
        (offload, when, SETTINGS[2 * half + ((when == "after") != (offload is _offload_whole))])
        for offload in (_offload_whole, _offload_one_by_one)
        for when in ("before", "after")
        for half in (0, 1)
    ],
    ids=lambda value: str(value) if isinstance(value, dict | str) else value.__name__,
)
def test_offloading_gives_the_same_picture_bit_for_bit(offload, when, settings):
    # From the CPU to the CPU, but through the same hooks of accelerate; one by one, they keep the
    # weights on the meta device until they are needed.
    pipe = sd_pipeline()
    unpatched = sample(pipe)
    with tomesd.patched(pipe, **settings):
        expected = sample(pipe)
    if when == "before":
        offload(pipe)
    tomesd.apply_patch(pipe, **settings)
    if when == "after":
        offload(pipe)
    assert torch.equal(sample(pipe), expected)
    tomesd.remove_patch(pipe)
    assert count_hooks(pipe.unet) == 0
    assert torch.equal(sample(pipe), unpatched)


def test_sequential_offloading_still_offloads():
    pipe = sd_pipeline()
    _offload_one_by_one(pipe)
    sample(tomesd.apply_patch(pipe, **EVERYTHING))
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_gives_the_same_picture_bit_for_bit(offload_type):
    expected = predict(tomesd.apply_patch(sd_unet()))
    unet = sd_unet()
    apply_group_offloading(
        unet,
        onload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
    )
    assert torch.equal(predict(tomesd.apply_patch(unet)), expected)


def _lora(folder) -> None:
    """Saves random LoRA weights for the tiny UNet."""
    unet = sd_unet()
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(unet))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_lora_adapters_may_be_loaded_before_or_after_and_unloaded_again(tmp_path, settings):
    _lora(tmp_path)
    before, after = sd_pipeline(), sd_pipeline()
    bare = sample(before)

    before.load_lora_weights(tmp_path)
    adapted = sample(before)
    tomesd.apply_patch(before, **settings)

    tomesd.apply_patch(after, **settings)
    merged = sample(after)
    after.load_lora_weights(tmp_path)

    both = sample(before)
    assert torch.equal(sample(after), both)
    assert not torch.equal(both, merged)
    assert not torch.equal(both, adapted)

    after.unload_lora_weights()
    assert torch.equal(sample(after), merged)
    assert torch.equal(sample(tomesd.remove_patch(after)), bare)
    assert torch.equal(sample(tomesd.remove_patch(before)), adapted)


def test_fused_lora_and_its_scale_work(tmp_path):
    _lora(tmp_path)
    pipe = tomesd.apply_patch(sd_pipeline())
    pipe.load_lora_weights(tmp_path)
    adapted = sample(pipe)
    weaker = sample(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not torch.equal(weaker, adapted)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), adapted, rtol=0, atol=1e-3)


def test_free_u_works():
    pipe = tomesd.apply_patch(sd_pipeline())
    before = sample(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert not torch.equal(sample(pipe), before)


@pytest.mark.parametrize("vae", ["enable_vae_slicing", "enable_vae_tiling"])
def test_slicing_the_autoencoder_is_not_affected(vae):
    pipe = tomesd.apply_patch(sd_pipeline())
    before = sample(pipe)
    getattr(pipe.vae, vae.replace("vae_", ""))()
    assert torch.equal(sample(pipe), before)


def test_a_callback_may_change_the_settings_between_steps():
    pipe = tomesd.apply_patch(sd_pipeline(), ratio=0.5)
    merged = []

    def callback(pipe, step, timestep, tensors):
        merged.append(tomesd.report(pipe).rows["unet"][0].merged)
        tomesd.apply_patch(pipe, ratio=0.25)
        return tensors

    sample(pipe, callback_on_step_end=callback, height=80, width=112)
    assert merged == [70, 105]


@pytest.mark.parametrize("config", [{"use_linear_projection": True}, {"layers_per_block": 2}])
def test_variants_of_the_unet_merge_and_are_restored(config):
    pipe = build_pipeline(
        StableDiffusionPipeline,
        sd_components(sd_unet(**config)) | {"requires_safety_checker": False},
    )
    before = sample(pipe)
    assert not torch.equal(sample(tomesd.apply_patch(pipe)), before)
    assert torch.equal(sample(tomesd.remove_patch(pipe)), before)


def test_the_unet_may_be_called_in_every_way():
    unet = tomesd.apply_patch(sd_unet(), use_rand=True)
    inputs = unet_inputs(unet)
    expected = unet(**inputs).sample
    assert torch.equal(unet(*inputs.values()).sample, expected)
    assert torch.equal(unet(**inputs, return_dict=False)[0], expected)
    for timestep in (500, 500.0, torch.tensor([500, 500])):
        assert torch.equal(unet(**inputs | {"timestep": timestep}).sample, expected)
    with torch.inference_mode():
        assert torch.equal(unet(**inputs).sample, expected)


def test_a_mask_on_the_text_works_with_merging():
    unet = sd_unet()
    inputs = unet_inputs(unet)
    masked = inputs | {"encoder_attention_mask": torch.arange(12).expand(2, 12) < 5}
    tomesd.apply_patch(unet, **EVERYTHING)
    assert not torch.equal(unet(**masked).sample, unet(**inputs).sample)


def test_a_mask_on_self_attention_is_refused_where_that_merges():
    unet = tomesd.apply_patch(sd_unet())
    masked = unet_inputs(unet) | {"attention_mask": torch.ones(2, 140)}
    with pytest.raises(ValueError, match="attention_mask"):
        unet(**masked)
    tomesd.remove_patch(unet)
