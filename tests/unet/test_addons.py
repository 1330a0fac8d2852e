"""Guidance by perturbed attention, GLIGEN and caches beside merging: right, or an error that helps.

Right means beside what the host computes without them, not beside an earlier run.
"""

import pytest
import torch
from diffusers import (
    PyramidAttentionBroadcastConfig,
    StableDiffusionGLIGENPipeline,
    StableDiffusionPAGPipeline,
    TaylorSeerCacheConfig,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention_processor import (
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)

import tomesd
from tests.support.recorders import attention_lengths, is_spatial
from tests.support.tiny_model import WIDTH
from tests.support.tiny_pipelines import build_pipeline, sample, sd_components
from tests.support.tiny_unets import TINY, predict, sd_unet, unet_inputs
from tomesd.diffusion.block import Place

SIZE = {"height": 80, "width": 112}
WAYS = [{}, {"prop_attn": False}, {"merge_attn": True}, {"preset": "paper"}]


def _sample(pipe, **call) -> torch.Tensor:
    return sample(pipe, **SIZE | call)


def _perturb(unet, processor) -> None:
    for name, module in unet.named_modules():
        if is_spatial(name):
            module.set_processor(processor)


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize(
    ("processor", "batch"),
    [(PAGCFGIdentitySelfAttnProcessor2_0(), 3), (PAGIdentitySelfAttnProcessor2_0(), 2)],
    ids=["with guidance", "without guidance"],
)
def test_samples_whose_attention_is_not_perturbed_are_as_without_perturbing(
    processor, batch, settings
):
    unet = tomesd.apply_patch(sd_unet(), **settings)
    expected = predict(unet, batch=batch)
    _perturb(unet, processor)
    got = predict(unet, batch=batch)
    torch.testing.assert_close(got[:-1], expected[:-1], rtol=0, atol=1e-5)
    assert (got[-1] - expected[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_perturbed_attention_guidance_merges_repeats_and_is_restored(settings, guidance):
    components = sd_components() | {"requires_safety_checker": False}
    pipe = build_pipeline(
        StableDiffusionPAGPipeline, components | {"pag_applied_layers": ["down", "mid"]}
    )
    call = {"guidance_scale": guidance, "pag_scale": 3.0}
    before = _sample(pipe, **call)
    tomesd.apply_patch(pipe, **settings)
    with attention_lengths(pipe.unet) as lengths:
        merged = _sample(pipe, **call)
    assert lengths["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == (70, 70)
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert not torch.equal(merged, _sample(pipe, guidance_scale=guidance, pag_scale=0.0))
    assert torch.equal(_sample(pipe, **call), merged)
    assert torch.equal(_sample(tomesd.remove_patch(pipe), **call), before)


@pytest.mark.parametrize("prop_attn", [False, True])
def test_perturbed_attention_is_refused_with_keys_of_their_own(prop_attn):
    unet = tomesd.apply_patch(sd_unet(), merge_queries=False, prop_attn=prop_attn)
    _perturb(unet, PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(ValueError, match="merge_queries must be True with perturbed-attention"):
        predict(unet)


OBJECTS = 3


def _gligen_unet():
    unet = sd_unet(attention_type="gated")
    for module in unet.modules():
        if type(module).__name__ == "GatedSelfAttentionDense":
            # They start shut.
            torch.nn.init.constant_(module.alpha_attn, 1.0)
            torch.nn.init.constant_(module.alpha_dense, 1.0)
    return unet


def _objects(seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "boxes": torch.rand(2, OBJECTS, 4, generator=draw),
        "masks": torch.ones(2, OBJECTS),
        "positive_embeddings": torch.randn(2, OBJECTS, WIDTH, generator=draw),
    }


@torch.no_grad()
def _grounded(unet, seed: int = 0) -> torch.Tensor:
    own = {"cross_attention_kwargs": {"gligen": _objects(seed)}}
    return unet(**unet_inputs(unet, h=10, w=14), **own).sample


@pytest.mark.parametrize(("settings", "tokens"), [({}, 70), ({"merge_attn": True}, 140)], ids=str)
def test_gligen_attends_to_objects_beside_merged_tokens(settings, tokens):
    unet = _gligen_unet()
    before = _grounded(unet)
    tomesd.apply_patch(unet, **settings)
    with attention_lengths(unet) as lengths:
        merged = _grounded(unet)
    length = lengths["down_blocks.0.attentions.0.transformer_blocks.0.fuser.attn"]
    assert length == (tokens + OBJECTS,) * 2
    assert torch.equal(_grounded(unet), merged)
    assert not torch.equal(_grounded(unet, seed=1), merged)
    assert not torch.equal(merged, before)
    assert torch.equal(_grounded(tomesd.remove_patch(unet)), before)


def test_in_gligen_merging_tokens_that_are_equal_changes_nothing_but_rounding():
    # So an object weighs as much beside merged tokens as beside all of them.
    unet = _gligen_unet().double()
    block = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    draw = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 4, 1, 4, 1, 16, dtype=torch.float64, generator=draw)
    x = cells.expand(2, 4, 2, 4, 2, -1).reshape(2, 64, -1)
    text, objects = torch.randn(2, 2, OBJECTS, WIDTH, dtype=torch.float64, generator=draw)
    own = {"gligen": {"objs": objects}}
    with torch.no_grad():
        expected = block(x, encoder_hidden_states=text, cross_attention_kwargs=own)
        tomesd.apply_patch(unet, ratio=0.75)
        own = own | {"tomesd_place": Place(((1, 8, 8),), 500)}
        got = block(x, encoder_hidden_states=text, cross_attention_kwargs=own)
    torch.testing.assert_close(got, expected)


def test_the_gligen_pipeline_works():
    components = sd_components(_gligen_unet()) | {"requires_safety_checker": False}
    pipe = build_pipeline(StableDiffusionGLIGENPipeline, components)
    call = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.9]]}
    before = _sample(pipe, **call)
    merged = _sample(tomesd.apply_patch(pipe), **call)
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert torch.equal(_sample(tomesd.remove_patch(pipe), **call), before)


def _broadcast(unet, **ranges) -> None:
    ranges = ranges or {"spatial_attention_block_skip_range": 2}
    config = PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500, **ranges)
    apply_pyramid_attention_broadcast(unet, config)


def _taylor(unet, name: str) -> None:
    config = TaylorSeerCacheConfig(cache_identifiers=[rf".*\.transformer_blocks\.0{name}"])
    apply_taylorseer_cache(unet, config)


@pytest.mark.parametrize(
    ("cache", "name", "settings"),
    [
        (_broadcast, "attn1", {}),
        (_broadcast, "attn1", {"merge_attn": True}),
        (lambda unet: _taylor(unet, ""), "block", {}),
        (lambda unet: _taylor(unet, r"\.attn1"), "attn1", {"merge_attn": True}),
        (lambda unet: _taylor(unet, r"\.attn2"), "attn2", {"preset": "paper"}),
        (lambda unet: _taylor(unet, r"\.ff"), "ff", {"merge_mlp": True}),
    ],
)
def test_a_cache_of_what_merges_is_refused(cache, name, settings):
    unet = sd_unet()
    cache(unet)
    with pytest.raises(ValueError, match=f"{name} must not be cached while its tokens merge"):
        tomesd.apply_patch(unet, **settings)
    later = tomesd.apply_patch(sd_unet(), **settings)
    cache(later)
    with pytest.raises(ValueError, match=rf'{name} must not be cached .* preset="quality"'):
        predict(later)


def test_attention_may_be_cached_where_only_keys_merge():
    unet = tomesd.apply_patch(sd_unet(), preset="quality")
    expected = predict(unet)
    _broadcast(unet)
    with attention_lengths(unet) as computed:
        assert torch.equal(predict(unet), expected)
    assert computed["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == (140, 70)
    with attention_lengths(unet) as computed:
        assert torch.equal(predict(unet), expected)
    assert not any(is_spatial(name) for name in computed)


def test_attention_that_does_not_merge_may_be_cached():
    tiny = TINY["UNetSpatioTemporalConditionModel"]
    model = tomesd.apply_patch(tiny.build())
    with torch.no_grad():
        expected = tiny.call(model)
        _broadcast(model, temporal_attention_block_skip_range=2)
        assert torch.equal(tiny.call(model), expected)
        with attention_lengths(model) as computed:
            assert torch.equal(tiny.call(model), expected)
    assert not any("temporal_transformer_blocks" in name for name in computed if "attn1" in name)
    assert any(is_spatial(name) for name in computed)


def test_a_host_that_reuses_deep_blocks_outputs_of_an_earlier_step_works_with_merging():
    # As DeepCache does: it replaces the forwards of a UNet's parts.
    unet = sd_unet()
    before = predict(unet)
    tomesd.apply_patch(unet, max_downsample=8)
    expected = predict(unet)
    kept, skipping = {}, False
    parts = [unet.down_blocks[1], unet.down_blocks[2], unet.mid_block, unet.up_blocks[0]]
    for part in [*parts, *unet.down_blocks[1].attentions, *unet.up_blocks[1].attentions]:

        def forward(*args, part=part, own=part.forward, **kwargs):
            if not skipping:
                kept[part] = own(*args, **kwargs)
            return kept[part]

        part.forward = forward
    assert torch.equal(predict(unet), expected)
    skipping = True
    with attention_lengths(unet) as computed:
        assert torch.equal(predict(unet), expected)
    assert {name.split(".")[1] for name in computed if name.startswith("down_blocks")} == {"0"}
    assert computed["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == (70, 70)
    for part in unet.modules():
        vars(part).pop("forward", None)
    assert torch.equal(predict(tomesd.remove_patch(unet)), before)
