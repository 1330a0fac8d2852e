"""What models of transformers compute from the outputs of all layers, with merging on."""

import pytest
import torch
import transformers as hf
from torch import nn

import tomesd
from tests.support.tiny_vits import build
from tests.support.tiny_vits_base import images
from tests.support.tiny_vits_transformers import configured, whisper_config
from tests.support.vit_reference import encode, unmerge
from tests.vit.test_families import run_patched
from tests.vit.test_transformers import R, families
from tomesd.vit.schedule import tokens_after


def states(name: str, **settings) -> tuple:
    vit = build(name)
    if settings:
        tomesd.apply_patch(vit.model, **settings)
    return vit.model(**vit.inputs, output_hidden_states=True).hidden_states


@families
@torch.no_grad()
def test_hidden_states_hold_all_tokens_of_every_layer(name):
    plain, merged = states(name), states(name, r=R)
    assert [x.shape for x in merged] == [x.shape for x in plain]
    assert torch.equal(merged[0], plain[0])
    left = tokens_after(R, plain[0].shape[1], build(name).prefix)
    assert [len(x[0].unique(dim=0)) for x in merged[1 : len(left) + 1]] == left


@torch.no_grad()
def test_hidden_states_without_unmerge_are_those_that_the_layers_get():
    assert [x.shape[1] for x in states("ViT", r=R, unmerge=False)] == [37, 34, 34, 25]


@torch.no_grad()
def test_hidden_states_are_the_same_whether_they_were_asked_for_before_patching():
    vit = build("ViT")
    vit.model(**vit.inputs, output_hidden_states=True)
    tomesd.apply_patch(vit.model, r=R)
    got = vit.model(**vit.inputs, output_hidden_states=True).hidden_states
    for a, b in zip(got, states("ViT", r=R), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_hidden_states_have_all_tokens_in_plain_tuples_too():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=R)
    named = vit.model.vit(**vit.inputs, output_hidden_states=True)
    plain = vit.model.vit(**vit.inputs, output_hidden_states=True, return_dict=False)
    for a, b in zip(plain[-1], named.hidden_states, strict=True):
        assert torch.equal(a, b)


def _random(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


def _depth() -> nn.Module:
    config = configured(
        {},
        backbone_out_indices=[0, 1, 2],
        neck_hidden_sizes=[8, 8, 8],
        reassemble_factors=[2, 1, 0.5],
        fusion_hidden_size=8,
    )
    return hf.DPTForDepthEstimation(hf.DPTConfig(**config))


def _pixio() -> nn.Module:
    family = {"n_cls_tokens": 3, "mlp_ratio": 2, "out_features": ["stage1", "stage3"]}
    return hf.PixioBackbone(hf.PixioConfig(**configured({}, **family)))


@pytest.mark.parametrize("make", [_depth, _pixio])
@torch.no_grad()
def test_decoders_of_several_layers_get_all_tokens_of_each(make):
    torch.manual_seed(0)
    model, x = _random(make()), images()
    plain = model(x)[0]
    tomesd.apply_patch(model, r=[0, 0, 9])
    merged = model(x)[0]
    if isinstance(merged, tuple):
        assert torch.equal(merged[0], plain[0])  # The first layer's.
        plain, merged = plain[1], merged[1]
    assert merged.shape == plain.shape
    assert not torch.equal(merged, plain)


@torch.no_grad()
def test_clipseg_decodes_the_layers_that_it_extracts():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**configured({}), "image_size": 24}
    config = hf.CLIPSegConfig(
        text_config=text | {"eos_token_id": 1},
        vision_config=vision,
        extract_layers=[0, 1, 2],
        projection_dim=8,
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    torch.manual_seed(0)
    model, x = _random(hf.CLIPSegForImageSegmentation(config)), images()
    ids = torch.tensor([[0, 5, 1], [0, 6, 1]])
    plain = model(input_ids=ids, pixel_values=x).logits
    tomesd.apply_patch(model, r=9)
    merged = model(input_ids=ids, pixel_values=x).logits
    assert merged.shape == plain.shape
    assert not torch.equal(merged, plain)


@torch.no_grad()
def test_whisper_s_decoder_attends_to_all_frames():
    torch.manual_seed(0)
    model = _random(hf.WhisperForConditionalGeneration(whisper_config()))
    sound, ids = torch.randn(2, 8, 72), torch.tensor([[1, 4, 5], [1, 6, 7]])
    plain = model(sound, decoder_input_ids=ids)
    tomesd.apply_patch(model, r=9)
    merged = model(sound, decoder_input_ids=ids)
    assert merged.encoder_last_hidden_state.shape == plain.encoder_last_hidden_state.shape
    assert not torch.equal(merged.logits, plain.logits)
    assert model.generate(sound, max_new_tokens=3).shape[0] == 2
    tomesd.apply_patch(model, r=9, unmerge=False)
    assert model(sound, decoder_input_ids=ids).encoder_last_hidden_state.shape[1] == 9


def test_whisper_with_skipped_layers_is_refused():
    model = hf.WhisperModel(whisper_config(encoder_layerdrop=0.1))
    with pytest.raises(ValueError, match=r"encoder_layerdrop must be 0: .* got 0\.1"):
        tomesd.apply_patch(model, r=9)


def test_speech_models_with_skipped_layers_are_refused_in_training_only():
    vit = build("HuBERT", layerdrop=0.1)
    tomesd.apply_patch(vit.model, r=3)
    vit.output()
    vit.model.train()
    with pytest.raises(ValueError, match=r"layerdrop must be 0: .* got 0\.1"):
        vit.output()
    with pytest.raises(ValueError, match=r"layerdrop must be 0: .* got 0\.1"):
        tomesd.apply_patch(vit.model, r=3)


@torch.no_grad()
def test_mid_position_embeddings_of_yolos_are_added_to_each_token():
    vit = build("YOLOS", use_mid_position_embeddings=True)
    plain = vit.output()
    tomesd.apply_patch(vit.model, r=[0, 0, 9])
    merged = vit.output()
    assert merged.shape == plain.shape
    tomesd.apply_patch(vit.model, r=9)
    assert vit.output().isfinite().all()
    (rows,) = tomesd.report(vit.model).rows.values()
    assert [row.merged for row in rows] == [33, 24, 15]


@torch.no_grad()
def test_eomt_masks_and_classes_are_those_of_all_patches():
    vit = build("EoMT")
    plain = vit.model(**vit.inputs)
    tomesd.apply_patch(vit.model, r=R)
    merged = vit.model(**vit.inputs)
    assert merged.masks_queries_logits.shape == plain.masks_queries_logits.shape
    assert not torch.equal(merged.masks_queries_logits, plain.masks_queries_logits)


@pytest.mark.parametrize("name", ["SigLIP 2", "Idefics 2", "Idefics 3", "SmolVLM"])
@torch.no_grad()
def test_patches_that_only_fill_up_a_batch_count_for_nothing(name):
    """Towers for pictures of any size mask the patches beyond a picture's own."""
    vit = build(name)
    hidden = torch.zeros(2, 36, dtype=torch.bool)
    hidden[0, 24:] = True
    if name == "SigLIP 2":
        vit.inputs["spatial_shapes"] = torch.tensor([[4, 6], [6, 6]])
        vit.inputs["pixel_attention_mask"] = (~hidden).long()
    else:
        vit.inputs["patch_attention_mask"] = ~hidden.view(2, 6, 6)
    first, last = run_patched(vit, r=R)
    for tokens, got, mask in zip(first, last, hidden, strict=True):
        expected = unmerge(*encode(tokens, vit.reference, R, 0, hidden=mask))
        torch.testing.assert_close(got[~mask], expected[~mask], atol=1e-3, rtol=1e-3)
