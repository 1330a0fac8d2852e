"""What cannot merge in a diffusion transformer is said in time, and nothing is changed by it."""

import importlib
import pkgutil
from typing import ClassVar

import diffusers
import pytest
import torch
from diffusers.models import controlnets, transformers, unets

import tomesd
from tests.support import tiny_unets
from tests.support.dit_blocks import FAMILIES
from tests.support.recorders import count_hooks
from tests.support.tiny_transformers import CONTROLNETS, TINY
from tests.support.tiny_vits import build as build_vit

SD3 = TINY["SD3Transformer2DModel"]


@pytest.mark.parametrize(
    "settings",
    [
        {"merge_block": False},
        {"merge_mlp": True},
        {"merge_crossattn": True},
        {"merge_queries": False},
        {"preset": "paper"},
        {"preset": "quality"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TINY)
def test_branches_of_a_transformers_block_do_not_merge_separately(name, settings):
    model = TINY[name].build()
    with pytest.raises(ValueError, match=f"merge_block must be True for {name}.*got False"):
        tomesd.apply_patch(model, **settings)
    assert count_hooks(model) == 0


def test_a_linear_transformer_is_refused_with_the_reason():
    model = diffusers.SanaTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, num_cross_attention_heads=1,
        cross_attention_head_dim=8, cross_attention_dim=8, caption_channels=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="must not be a SanaTransformer2DModel: its attention is"):
        tomesd.apply_patch(model)


def _models() -> dict[str, type]:
    """All transformers, UNets and ControlNets of diffusers."""
    found = {}
    for package in (controlnets, transformers, unets):
        for part in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{part.name}")
            for name, kind in vars(module).items():
                own = isinstance(kind, type) and kind.__module__ == module.__name__
                if own and issubclass(kind, diffusers.ModelMixin):
                    found[name] = kind
    return found


MODELS = _models()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_denoiser_of_diffusers_merges_or_is_refused_by_name_with_a_reason(name):
    if name in tomesd.supported()["diffusers"]:
        tested = {tiny.name for tiny in FAMILIES.values()} | set(tiny_unets.TINY)
        # The same blocks in the same places as a ControlNetModel; test_addons_after_patching.
        assert name in tested | {"ControlNetUnionModel"}
        return
    # What it is called is all that counts.
    empty = _empty(name)
    if "Multi" in name:
        # A list of ControlNets, each of which merges if it can.
        empty.nets = torch.nn.ModuleList([CONTROLNETS["SD3ControlNetModel"].build()])
        tomesd.apply_patch(empty)
        assert set(tomesd.report(empty).rows) == {"nets.0"}
        return
    with pytest.raises(TypeError, match=rf"must not be a {name}: \w+ |got {name}\."):
        tomesd.apply_patch(empty)
    assert not any("_tomesd" in key for key in vars(empty))


def test_a_unet_with_attention_but_no_transformers_is_refused_with_the_reason():
    """As those of DeepFloyd IF and Kandinsky 2 are."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=16, norm_num_groups=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="its attention has no transformer around it, and is too"):
        tomesd.apply_patch(model)
    assert count_hooks(model) == 0


def test_a_pipeline_is_told_of_its_denoiser_and_not_of_its_image_encoder():
    """Its user would be told to give r, and the images would stay what they are."""

    class CosmosTransformer3DModel(torch.nn.Module):
        pass

    class Pipeline:
        components: ClassVar = {
            "image_encoder": build_vit("CLIP").model,
            "transformer": CosmosTransformer3DModel(),
        }

    with pytest.raises(TypeError, match=r"got CosmosTransformer3DModel\. The closest") as refused:
        tomesd.apply_patch(Pipeline(), ratio=0.5)
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("part", ["transformer", "unet", "prior", "decoder"])
def test_a_pipeline_is_told_the_reason_of_its_denoiser_whatever_else_it_has(part):
    """Also if something else in it is refused for a reason of its own."""

    class Pipeline:
        components: ClassVar = {
            "another": _empty("SanaTransformer2DModel"),
            "image_encoder": build_vit("CLIP").model,
            part: _empty("LTX2VideoTransformer3DModel"),
        }

    for settings in ({}, {"ratio": 0.5}):
        with pytest.raises(TypeError, match="must not be a LTX2VideoTransformer3DModel: in its"):
            tomesd.apply_patch(Pipeline(), **settings)


def test_one_learns_that_r_leaves_the_denoiser_of_a_pipeline_as_it_is():
    class Pipeline:
        components: ClassVar = {
            "image_encoder": build_vit("CLIP").model,
            "transformer": _empty("LTX2VideoTransformer3DModel"),
        }

    with pytest.warns(UserWarning, match=r"only in the pipeline's CLIP\w*: LTX2VideoTransformer3D"):
        tomesd.apply_patch(Pipeline(), r=1)


def _empty(name: str) -> torch.nn.Module:
    """A model without its layers."""
    model = MODELS[name].__new__(MODELS[name])
    torch.nn.Module.__init__(model)
    return model


def test_supported_lists_what_can_be_patched():
    listed = tomesd.supported()
    assert set(TINY) < set(listed["diffusers"])
    assert "UNet2DConditionModel" in listed["diffusers"]
    assert "ViTModel" in listed["transformers"]
    assert "SanaTransformer2DModel" not in listed["diffusers"]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="nothing would be merged in SD3Transformer2DModel"):
        tomesd.apply_patch(SD3.build(num_layers=0))


def test_fused_projections_need_prop_attn_off():
    # The host's own fused processor knows neither of 3.5's novelties.
    plain = {"dual_attention_layers": (), "qk_norm": None}
    model = SD3.build(**plain)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"prop_attn must be False .*got True"):
        tomesd.apply_patch(model)
    assert count_hooks(model) == 0
    with torch.no_grad():
        fused = SD3.call(tomesd.apply_patch(model, prop_attn=False))
        expected = SD3.call(tomesd.apply_patch(SD3.build(**plain), prop_attn=False))
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)


def test_a_mask_of_image_tokens_cannot_be_combined_with_merging():
    tiny = TINY["PixArtTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    with pytest.raises(ValueError, match="attention_mask on self-attention"):
        tiny.call(model, attention_mask=torch.ones(2, 35))


def test_texts_of_several_lengths_before_the_image_are_refused():
    """Their images begin at different tokens."""
    tiny = TINY["Lumina2Transformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    with pytest.raises(ValueError, match="attention_mask on self-attention"):
        tiny.call(model, encoder_attention_mask=mask)


def test_pictures_of_several_sizes_or_in_lists_are_refused():
    tiny = TINY["ZImageTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    (one, other), smaller = tiny.inputs()["x"], tiny.inputs(h=4, w=6)["x"][0]
    with pytest.raises(ValueError, match="x must list latents of one size while tokens merge"):
        tiny.call(model, x=[one, smaller])
    with pytest.raises(ValueError, match="x must be a list of latents while tokens merge"):
        tiny.call(model, x=[[one], [other]])


def test_a_video_conditioned_on_replaced_tokens_is_refused():
    model = TINY["HunyuanVideoTransformer3DModel"].build(image_condition_type="token_replace")
    with pytest.raises(ValueError, match="nothing would be merged in HunyuanVideoTransformer3D"):
        tomesd.apply_patch(model)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("prop_attn", [False, True])
def test_causal_attention_between_frames_is_refused(prop_attn):
    tiny = TINY["SkyReelsV2Transformer3DModel"]
    model = tomesd.apply_patch(tiny.build(), prop_attn=prop_attn)
    # As its pipeline does it.
    model._set_ar_attention(3)
    with pytest.raises(ValueError, match="attention_mask on self-attention"):
        tiny.call(model)


def test_blocks_that_are_left_alone_are_reported_with_the_reason():
    tiny = TINY["WanVACETransformer3DModel"]
    model = tomesd.apply_patch(tiny.build())
    tiny.call(model)
    assert "vace_blocks" in str(tomesd.report(model))
    assert "they hand on what they make of every token" in str(tomesd.report(model))


def test_a_cache_of_keys_is_refused():
    tiny = TINY["Flux2Transformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    with pytest.raises(ValueError, match=r"kv_cache_mode must be None .*got 'extract'"):
        tiny.call(model, kv_cache_mode="extract")


def test_a_cache_that_keeps_outputs_from_step_to_step_is_refused():
    tiny = TINY["FluxTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="cache must not be enabled while tokens merge"):
        tiny.call(model)
    model.disable_cache()
    assert tiny.call(model).isfinite().all()


@pytest.mark.parametrize("change", [lambda ids: ids.flip(0)[1:], lambda ids: ids.roll(3, 0)])
def test_image_ids_that_are_no_grid_are_refused(change):
    tiny = TINY["FluxTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    ids = change(tiny.inputs()["img_ids"])
    with pytest.raises(ValueError, match="img_ids must list the tokens of each image row by row"):
        tiny.call(model, img_ids=ids)


def test_a_picture_that_is_too_small_to_merge_is_left_alone_with_a_warning():
    model = SD3.build()
    with torch.no_grad():
        expected = SD3.call(model)
        tomesd.apply_patch(model, min_tokens=36)
        with pytest.warns(UserWarning, match=r"nothing merges in SD3.*fewer than min_tokens=36"):
            assert torch.equal(SD3.call(model), expected)
        assert "fewer than min_tokens=36" in str(tomesd.report(model))
        tomesd.apply_patch(model, min_tokens=35)
        assert not torch.equal(SD3.call(model), expected)
