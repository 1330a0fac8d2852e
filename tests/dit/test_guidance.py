"""Guidance that skips or perturbs layers, by diffusers' guiders, while tokens merge."""

import pytest
import torch
from diffusers import AutoGuidance, LayerSkipConfig, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import smoothed_energy_guidance_utils as smoothed
from diffusers.models.attention_processor import (
    PAGCFGHunyuanAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
    PAGHunyuanAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)
from torch import Tensor, nn

import tomesd
from tests.support.recorders import AttentionRecorder
from tests.support.tiny_transformers import TINY, TinyTransformer

PIXART, WAN = "PixArtTransformer2DModel", "WanTransformer3DModel"
SD3, COGVIDEOX = "SD3Transformer2DModel", "CogVideoXTransformer3DModel"
COGVIEW4, HUNYUAN = "CogView4Transformer2DModel", "HunyuanDiT2DModel"


def _where(model) -> str:
    return next(name for name, _ in model.named_children() if name.endswith("blocks"))


@torch.no_grad()
def _predictions(tiny: TinyTransformer, model: nn.Module, guider) -> list[Tensor]:
    """What the model gives for each of a guider's passes in one step."""
    texts = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))
    found = []
    for batch in guider.prepare_inputs({"encoder_hidden_states": tuple(texts)}):
        guider.prepare_models(model)
        found.append(tiny.call(model, encoder_hidden_states=batch.encoder_hidden_states))
        guider.cleanup_models(model)
    return found


def _skip_layers(model: nn.Module) -> SkipLayerGuidance:
    layers = LayerSkipConfig([0, 1], fqn=_where(model))
    return SkipLayerGuidance(skip_layer_config=layers, skip_layer_guidance_stop=1.0)


@pytest.mark.parametrize("name", [PIXART, WAN, COGVIDEOX, SD3])
def test_skipping_all_blocks_gives_what_it_gives_without_merging(name):
    """They hand on what they were given: nothing is left that merging could change."""
    tiny = TINY[name]
    model = tiny.build()
    plain = _predictions(tiny, model, _skip_layers(model))
    merged = _predictions(tiny, tomesd.apply_patch(model), _skip_layers(model))
    assert len(plain) == len(merged) == 3
    assert torch.equal(plain[2], merged[2])
    assert not torch.equal(plain[0], plain[2])
    assert not any(torch.equal(*pair) for pair in zip(plain[:2], merged[:2], strict=True))


@pytest.mark.parametrize("name", [PIXART, COGVIEW4])
def test_perturbed_attention_guidance_perturbs_merged_tokens(name):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    scores = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    layers = LayerSkipConfig([0, 1], fqn=_where(model), **scores)
    guider = PerturbedAttentionGuidance(
        perturbed_guidance_config=layers, perturbed_guidance_stop=1.0
    )
    with AttentionRecorder() as attention:
        attended, _, perturbed = _predictions(tiny, model, guider)
    assert not torch.equal(perturbed, attended)
    to_text = [(18, 5)] * (name == PIXART)
    own = [(18, 18) if name == PIXART else (18 + 5, 18 + 5)]
    # Two blocks in two passes; in the third, attention to the text alone.
    assert attention.seen == (own + to_text) * 4 + to_text * 2
    # And the hooks are gone.
    assert torch.equal(_predictions(tiny, model, guider)[0], attended)


@pytest.mark.parametrize("name", [PIXART, WAN])
def test_auto_guidance_drops_what_merged_tokens_give(name):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    layers = LayerSkipConfig([0], fqn=_where(model), dropout=0.3)
    guided = AutoGuidance(auto_guidance_config=layers)
    with AttentionRecorder() as attention:
        whole, dropped = _predictions(tiny, model, guided)
    assert dropped.isfinite().all()
    assert not torch.equal(whole, dropped)
    assert {queries for queries, _ in attention.seen} == {tiny.frames * 18}


@torch.no_grad()
def test_smoothed_energy_guidance_is_refused_where_queries_merge():
    """It blurs queries in a square, which merged tokens are not in."""
    tiny = TINY[PIXART]
    model = tiny.build()
    plain = tiny.call(model)
    layers = smoothed.SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks")
    smoothed._apply_smoothed_energy_guidance_hook(model, layers, blur_sigma=1.0)
    blurred = tiny.call(model)
    assert not torch.equal(blurred, plain)
    with pytest.raises(ValueError, match="smoothed-energy guidance cannot be combined with merged"):
        tomesd.apply_patch(model)
    assert torch.equal(tiny.call(model), blurred)
    later = tomesd.apply_patch(tiny.build())
    smoothed._apply_smoothed_energy_guidance_hook(later, layers, blur_sigma=1.0)
    with pytest.raises(ValueError, match="smoothed-energy guidance cannot be combined with merged"):
        tiny.call(later)


# Processors that split the batch: the last samples attend to themselves alone.
SPLITTING = [
    (SD3, PAGCFGJointAttnProcessor2_0, 3),
    (SD3, PAGJointAttnProcessor2_0, 2),
    (PIXART, PAGCFGIdentitySelfAttnProcessor2_0, 3),
    (PIXART, PAGIdentitySelfAttnProcessor2_0, 2),
    (HUNYUAN, PAGCFGHunyuanAttnProcessor2_0, 3),
    (HUNYUAN, PAGHunyuanAttnProcessor2_0, 2),
]


@pytest.mark.parametrize(("name", "processor", "batch"), SPLITTING)
@torch.no_grad()
def test_samples_whose_attention_is_not_perturbed_are_as_without_perturbing(name, processor, batch):
    """In pipelines for perturbed-attention guidance, which put processors in place."""
    tiny = TINY[name]
    # The second attention of 3.5 is not perturbed.
    own = {"dual_attention_layers": (), "qk_norm": None} if name == SD3 else {}
    model = tomesd.apply_patch(tiny.build(**own), ratio=0.5)
    expected = tiny.call(model, batch=batch)
    blocks = list(model._tomesd_patch.blocks)
    # Where all samples merge alike, the perturbed one would change how later blocks merge.
    for block in blocks[-1:] if tiny.one_map else blocks:
        (block.attn if name == SD3 else block.attn1).set_processor(processor())
    with AttentionRecorder() as attention:
        got = tiny.call(model, batch=batch)
    assert {queries for queries, _ in attention.seen} <= {18, 18 + 5, 35}
    torch.testing.assert_close(got[:-1], expected[:-1], rtol=0, atol=1e-5)
    assert got.isfinite().all()
    assert (got[-1] - expected[-1]).abs().max() > 1e-3
    assert torch.equal(tiny.call(model, batch=batch), got)
