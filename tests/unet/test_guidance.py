"""Guidance that skips or perturbs layers of a UNet, by hooks of diffusers, while tokens merge."""

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from diffusers.hooks import smoothed_energy_guidance_utils as smoothed

import tomesd
from tests.support.recorders import attention_lengths
from tests.support.tiny_unets import predict, sd_unet

# The finest level's only block on the way down.
WHERE = "down_blocks.0.attentions.0.transformer_blocks"
SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}


def _perturbed():
    unet = sd_unet()
    apply_layer_skip(unet, LayerSkipConfig([0], fqn=WHERE, **SCORES))
    return unet


def _smoothed():
    unet = sd_unet()
    layers = smoothed.SmoothedEnergyGuidanceConfig([0], fqn=WHERE)
    smoothed._apply_smoothed_energy_guidance_hook(unet, layers, blur_sigma=1.0)
    return unet


def test_a_skipped_block_returns_its_input():
    unet = sd_unet()
    block = unet.get_submodule(WHERE)[0]
    given, output = [], []
    block.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    tomesd.apply_patch(unet)
    block.register_forward_hook(lambda *call: output.append(call[2]))
    apply_layer_skip(unet, LayerSkipConfig([0], fqn=WHERE))
    predict(unet)
    assert torch.equal(given[0], output[0])


def test_perturbed_attention_perturbs_merged_tokens_where_queries_merge():
    unperturbed = predict(tomesd.apply_patch(sd_unet(), ratio=0.5))
    unet = _perturbed()
    unpatched = predict(unet)
    tomesd.apply_patch(unet, ratio=0.5)
    with attention_lengths(unet) as lengths:
        merged = predict(unet)
    assert lengths[f"{WHERE}.0.attn1"] == (70, 70)
    assert not torch.equal(merged, unperturbed)
    assert torch.equal(predict(tomesd.remove_patch(unet)), unpatched)


def test_perturbed_attention_is_refused_where_only_keys_merge():
    """Diffusers would leave attention as it is, since each query needs a value of its own."""
    unet = tomesd.apply_patch(_perturbed(), preset="quality")
    with pytest.raises(ValueError, match="merge_queries must be True with perturbed-attention"):
        predict(unet)


def test_smoothed_energy_guidance_needs_every_query():
    """It blurs them in a square."""
    unet = _smoothed()
    unpatched = predict(unet)
    tomesd.apply_patch(unet)
    with pytest.raises(ValueError, match="smoothed-energy guidance cannot be combined with merged"):
        predict(unet)
    merged = predict(tomesd.apply_patch(unet, preset="quality"))
    assert merged.isfinite().all()
    assert not torch.equal(merged, unpatched)
    assert not torch.equal(merged, predict(tomesd.apply_patch(sd_unet(), preset="quality")))
