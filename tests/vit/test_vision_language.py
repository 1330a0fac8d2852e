"""Fewer visual tokens for the language model: unmerge=False and as many placeholders."""

import pytest
import torch
import transformers as hf
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

import tomesd

IMAGE = 9
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 32,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}


def llava(**config):
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        **config,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT),
        projection_dim=24,
        image_token_index=IMAGE,
    )
    return hf.PaliGemmaForConditionalGeneration(config).eval()


def logits(model, placeholders):
    ids = torch.tensor([[1, *[IMAGE] * placeholders, 4, 5]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return model(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits


@torch.no_grad()
def test_llava_s_language_model_gets_as_many_visual_tokens_as_are_left():
    torch.manual_seed(0)
    model = llava(vision_feature_layer=-2)
    assert logits(model, 36).shape[1] == 39
    tomesd.apply_patch(model, r=5, unmerge=False)
    left = tomesd.tokens_after(model, hidden_state=-2) - 1  # It drops the class token.
    assert left == 36 - 2 * 5
    assert logits(model, left).isfinite().all()
    with pytest.raises(ValueError, match="tokens"):
        logits(model, 36)


@torch.no_grad()
def test_paligemma_s_language_model_gets_as_many_visual_tokens_as_are_left():
    torch.manual_seed(0)
    model = paligemma()
    assert logits(model, 36).shape[1] == 39
    tomesd.apply_patch(model, r=5, unmerge=False)
    left = tomesd.tokens_after(model)
    assert left == 36 - 3 * 5
    assert logits(model, left).isfinite().all()


@pytest.mark.parametrize("unmerge", [True, False])
def test_a_projector_that_needs_the_grid_is_refused_by_name(unmerge):
    config = hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT)
    )
    with torch.device("meta"):
        model = hf.SmolVLMForConditionalGeneration(config)
    assert any(isinstance(module, SmolVLMConnector) for module in model.modules())
    if unmerge:
        tomesd.apply_patch(model, r=5)
        return
    with pytest.raises(ValueError, match="unmerge must be True with SmolVLMConnector, which joins"):
        tomesd.apply_patch(model, r=5, unmerge=False)


def test_gemma_3_s_projector_is_refused_by_name():
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(**TEXT),
        mm_tokens_per_image=9,
    )
    with torch.device("meta"):
        model = hf.Gemma3ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="unmerge must be True with Gemma3MultiModalProjector"):
        tomesd.apply_patch(model, r=5, unmerge=False)


PIXTRAL = hf.PixtralVisionConfig(**VISION | {"head_dim": 12})
SPLIT = {
    "Mistral3MultiModalProjector": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(vision_config=PIXTRAL, text_config=hf.MistralConfig(**TEXT))
    ),
    "LlavaModel": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=PIXTRAL, text_config=hf.LlamaConfig(**TEXT))
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_what_splits_tokens_by_the_sizes_of_pictures_is_refused_by_name(name):
    with torch.device("meta"):
        model = SPLIT[name]()
    tomesd.apply_patch(model, r=5)
    with pytest.raises(ValueError, match=f"unmerge must be True with {name}, which"):
        tomesd.apply_patch(model, r=5, unmerge=False)


def test_tokens_after_says_what_is_wrong():
    model = llava()
    with pytest.raises(ValueError, match="must have one patched Vision Transformer, got 0"):
        tomesd.tokens_after(model)
    tomesd.apply_patch(model, r=5, unmerge=False)
    assert [tomesd.tokens_after(model, i) for i in range(4)] == [37, 32, 27, 22]
    assert tomesd.tokens_after(model, tokens=26) == 11
    with pytest.raises(ValueError, match="hidden_state must be from -4 to 3, got 4"):
        tomesd.tokens_after(model, 4)
