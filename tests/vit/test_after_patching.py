"""What is changed in a Vision Transformer after patching is followed, or refused clearly."""

import pytest
import torch
import transformers as hf
from torch import nn

import tomesd
from tests.support.tiny_vits import build


def patched(name, **settings):
    vit = build(name)
    tomesd.apply_patch(vit.model, **{"r": 3} | settings)
    vit.output()
    return vit


@torch.no_grad()
def test_lora_on_the_keys_that_is_added_later_is_matched_on():
    peft = pytest.importorskip("peft")
    vit = patched("ViT")
    config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    peft.get_peft_model(vit.model, config)
    followed = vit.output()
    tomesd.remove_patch(vit.model)
    tomesd.apply_patch(vit.model, r=3)
    assert torch.equal(vit.output(), followed)


@torch.no_grad()
@pytest.mark.parametrize("place", ["mlp", "norm2"])
def test_a_swapped_mlp_or_norm_is_followed(place):
    vit = patched("timm")
    vit.model.blocks[1].set_submodule(place, nn.Identity())
    followed = vit.output()
    tomesd.remove_patch(vit.model)
    tomesd.apply_patch(vit.model, r=3)
    assert torch.equal(vit.output(), followed)


@torch.no_grad()
def test_layers_that_are_pruned_later_leave_every_token_in_the_output():
    vit = patched("timm")
    vit.model.prune_intermediate_layers([1], prune_norm=False, prune_head=False)
    vit.output()
    assert vit.model.forward_features(**vit.inputs).shape[1] == 37
    assert len(tomesd.report(vit.model).rows["VisionTransformer"]) == 2
    tomesd.remove_patch(vit.model)
    assert not any(block._forward_hooks for block in vit.blocks[:2])


@torch.no_grad()
def test_an_attention_that_takes_no_bias_is_refused_as_before_patching():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=3)
    vit.model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"prop_attn must be False with .*flex_attention"):
        vit.output()


@torch.no_grad()
def test_setting_r_on_the_model_as_tome_did_is_refused_with_what_to_do():
    vit = patched("timm")
    vit.model.r = 8
    with pytest.raises(TypeError, match=r"r must be set by apply_patch\(model, r=8\)"):
        vit.output()


def test_a_pipeline_of_transformers_is_patched_by_its_model():
    size = {"height": 24, "width": 24}
    processor = hf.ViTImageProcessor(size=size)
    model = build("ViT").model
    pipe = hf.pipeline("image-classification", model=model, image_processor=processor)
    assert tomesd.apply_patch(pipe, r=8) is pipe
    assert tomesd.report(pipe).rows["vit"][0].merged == 29
    tomesd.remove_patch(pipe)
    with pytest.raises(ValueError, match="must be patched"):
        tomesd.report(pipe)
