"""What is loaded, fused or cached after patching is followed, or refused; never silently wrong."""

import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from peft import LoraConfig
from PIL import Image

import tomesd
from tests.support.recorders import inputs_of
from tests.support.tiny_pipelines import build_pipeline, sample, sd_pipeline, sdxl_components
from tests.support.tiny_transformers import TINY
from tests.support.tiny_unets import controlnet, predict, sd_unet

SD3 = TINY["SD3Transformer2DModel"]
PLAIN = {"dual_attention_layers": (), "qk_norm": None}


def _add_lora(model):
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@torch.no_grad()
def test_lora_that_is_added_after_patching_merges_like_one_from_before():
    adapted = SD3.build()
    _add_lora(adapted)
    expected = SD3.call(tomesd.apply_patch(adapted))
    model = tomesd.apply_patch(SD3.build())
    _add_lora(model)
    assert torch.equal(SD3.call(model), expected)


@torch.no_grad()
def test_lora_that_is_unloaded_after_patching_leaves_proportional_attention():
    merged = SD3.call(tomesd.apply_patch(SD3.build()))
    model = SD3.build()
    _add_lora(model)
    tomesd.apply_patch(model)
    model.unload_lora()
    assert torch.equal(SD3.call(model), merged)


@torch.no_grad()
def test_projections_that_are_fused_after_patching_are_refused():
    model = tomesd.apply_patch(SD3.build(**PLAIN))
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="prop_attn must be False with fused projections"):
        SD3.call(model)


def test_projections_of_a_unet_that_are_fused_after_patching_are_refused_for_keys_only():
    unet = tomesd.apply_patch(sd_unet(), merge_queries=False)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="merge_queries must be True with fused projections"):
        predict(unet)


def _first_block(model):
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=100.0))


def _broadcast(model):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(model, config)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("apply", [_first_block, _broadcast])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
@torch.no_grad()
def test_caches_applied_by_diffusers_functions_are_refused(name, apply, when):
    tiny = TINY[name]
    model = tiny.build()
    if when == "before":
        apply(model)
        with pytest.raises(ValueError, match="cache"):
            tomesd.apply_patch(model)
        return
    tomesd.apply_patch(model)
    apply(model)
    with model.cache_context("cond"), pytest.raises(ValueError, match="cache"):
        tiny.call(model)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "PixArtTransformer2DModel"])
@torch.no_grad()
def test_broadcast_on_models_without_enable_cache_is_refused(name):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build())
    _broadcast(model)
    with pytest.raises(ValueError, match="cache"):
        tiny.call(model)


def _broadcast_cross(model):
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(model, config)


@torch.no_grad()
def test_broadcast_of_cross_attention_is_refused():
    tiny = TINY["PixArtTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    _broadcast_cross(model)
    with pytest.raises(ValueError, match="cache"):
        tiny.call(model)


@pytest.mark.parametrize("settings", [{}, {"merge_crossattn": True}], ids=str)
def test_broadcast_of_cross_attention_is_refused_in_a_unet(settings):
    unet = tomesd.apply_patch(sd_unet(), **settings)
    _broadcast_cross(unet)
    with pytest.raises(ValueError, match="cache"):
        predict(unet)


def test_broadcast_on_a_unet_works_where_only_keys_merge():
    unet = tomesd.apply_patch(sd_unet(), merge_queries=False)
    first = predict(unet)
    _broadcast(unet)
    assert torch.equal(predict(unet), first)
    kept = predict(unet, seed=1)
    tomesd.remove_patch(unet)
    assert kept.isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("settings", [{}, {"merge_attn": True}], ids=str)
def test_broadcast_on_a_unet_is_refused_where_queries_merge(settings, when):
    unet = sd_unet()
    if when == "before":
        _broadcast(unet)
        with pytest.raises(ValueError, match="cache"):
            tomesd.apply_patch(unet, **settings)
    else:
        tomesd.apply_patch(unet, **settings)
        _broadcast(unet)
        with pytest.raises(ValueError, match="cache"):
            predict(unet)


def test_a_union_controlnet_merges_beside_its_unet():
    torch.manual_seed(1)
    net = ControlNetUnionModel(
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=32,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        conditioning_embedding_out_channels=(8,) * 4,
        num_trans_channel=16,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=16,
        num_control_type=2,
    )
    parts = sdxl_components() | {"controlnet": net.eval(), "add_watermarker": False}
    pipe = tomesd.apply_patch(build_pipeline(StableDiffusionXLControlNetUnionPipeline, parts))
    picture = Image.linear_gradient("L").convert("RGB").resize((112, 80))
    call = {"control_image": [picture], "control_mode": [0], "output_type": "latent"}
    pipe("a cat", num_inference_steps=1, **call)
    assert set(tomesd.report(pipe).rows) == {"unet", "controlnet"}
    assert all(
        any(row.merged < row.tokens for row in rows) for rows in tomesd.report(pipe).rows.values()
    )


SIZE = {"height": 80, "width": 112}
FINEST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def test_a_pipeline_made_from_a_patched_one_merges_and_its_steps_count_for_a_schedule():
    pipe = sd_pipeline()
    tomesd.apply_patch(pipe, ratio=tomesd.RatioSchedule.first(0.5, until=0.5))
    picture = Image.linear_gradient("L").convert("RGB").resize((112, 80))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with inputs_of(other.unet, FINEST) as seen:
        sample(other, image=picture, strength=1.0, num_inference_steps=4)
    assert seen == [(2, 70), (2, 70), (2, 140), (2, 140)]
    assert tomesd.report(other).rows["unet"] == tomesd.report(pipe).rows["unet"]
    tomesd.remove_patch(other)
    with pytest.raises(ValueError, match="without a patch"):
        tomesd.report(pipe)


def test_one_learns_that_the_part_that_was_patched_has_been_replaced():
    pipe = tomesd.apply_patch(sd_pipeline())
    pipe.unet = sd_unet(seed=1)
    with pytest.raises(ValueError, match="again if the patched part has been replaced"):
        tomesd.report(pipe)
    both = torch.nn.ModuleDict({"unet": sd_unet(), "controlnet": controlnet(sd_unet())})
    tomesd.apply_patch(both)
    both["unet"] = sd_unet(seed=1)
    assert "not patched: it was added later" in str(tomesd.report(both))
    assert tomesd.report(both).rows["controlnet"][0].note == ""


def test_one_learns_that_blocks_were_replaced():
    unet = tomesd.apply_patch(sd_unet())
    assert "replaced" not in str(tomesd.report(unet))
    unet.down_blocks[0].attentions[0] = sd_unet().down_blocks[0].attentions[0]
    assert "replaced since: call apply_patch again" in str(tomesd.report(unet))
    assert predict(unet).isfinite().all()


@torch.no_grad()
def test_an_error_in_the_middle_of_a_block_leaves_nothing_behind():
    unet = tomesd.apply_patch(sd_unet())
    expected = predict(unet)
    for part in ("attn1", "attn2", "ff", "attn1.to_k"):
        module = unet.get_submodule(FINEST.removesuffix("attn1") + part)
        handle = module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(unet, h=8, w=8)
        handle.remove()
        assert torch.equal(predict(unet), expected)
