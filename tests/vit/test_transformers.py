"""What transformers' Vision Transformers do beyond a forward, with merging on."""

import copy

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tomesd
from tests.support.slow import VIT_KINDS, slow
from tests.support.tiny_vits import TRANSFORMERS, build
from tests.support.vit_reference import encode

families = pytest.mark.parametrize("name", TRANSFORMERS)
kinds = pytest.mark.parametrize("name", sorted(VIT_KINDS & set(TRANSFORMERS)))
R = [3, 0, 9]


@families
@torch.no_grad()
def test_eager_and_sdpa_attention_give_the_same(name):
    eager = build(name, attn_implementation="eager")
    sdpa = build(name, attn_implementation="sdpa")
    for vit in (eager, sdpa):
        tomesd.apply_patch(vit.model, r=R)
    torch.testing.assert_close(eager.output(), sdpa.output(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attentions_are_those_that_were_computed():
    vit = build("ViT", attn_implementation="eager")
    tomesd.apply_patch(vit.model, r=R)
    attentions = vit.model(**vit.inputs, output_attentions=True).attentions
    assert [x.shape[-1] for x in attentions] == [37, 34, 34]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prop_attn", [True, False])
@torch.no_grad()
def test_tokens_that_an_attention_mask_hides_count_for_nothing(attention, prop_attn):
    vit = build("ViT", attn_implementation=attention)
    mask = torch.ones(2, 37)
    mask[0, 20:30] = 0
    vit.inputs["attention_mask"] = mask
    seen = {}
    hook = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0]))
    tomesd.apply_patch(vit.model, r=R, prop_attn=prop_attn)
    out = vit.model.vit(**vit.inputs).last_hidden_state
    hook.remove()
    tomesd.remove_patch(vit.model)
    for i, tokens in enumerate(seen["first"]):
        merged, groups = encode(tokens, vit.reference, R, 1, prop_attn, mask[i] == 0)
        for token, members in zip(vit.model.vit.layernorm(merged), groups, strict=True):
            visible = [j for j in members if mask[i, j]]
            expected = token.expand(len(visible), -1)
            torch.testing.assert_close(out[i, visible], expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_what_an_attention_mask_hides_cannot_change_the_rest():
    """Where the same visible tokens merge, which hidden ones decide as well."""
    vit = build("ViT")
    vit.inputs = {"pixel_values": torch.randn(32, 3, 24, 24)}
    mask = torch.ones(32, 37)
    mask[:, 20:] = 0
    vit.inputs["attention_mask"] = mask
    tomesd.apply_patch(vit.model, r=[1, 0, 0])
    expected = vit.output()
    vit.inputs["pixel_values"][:, :, 16:] += 10  # Rows of patches that are hidden altogether.
    group = vit.model.vit._tomesd_patch.forward.maps[-1].group
    assert group.unique().numel() < 37
    changed = vit.output()
    same = (vit.model.vit._tomesd_patch.forward.maps[-1].group[:, :20] == group[:, :20]).all(1)
    assert same.any()
    torch.testing.assert_close(changed[same], expected[same], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_attention_mask_that_differs_between_queries_is_refused():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=3)
    mask = torch.ones(37, 37).tril().bool().expand(2, 1, 37, 37)
    with pytest.raises(ValueError, match="attention_mask must hide the same tokens from all"):
        vit.model(**vit.inputs, attention_mask=mask)


@torch.no_grad()
def test_an_attention_mask_beside_a_relative_position_bias_is_refused():
    vit = build("BEiT")
    tomesd.apply_patch(vit.model, r=3)
    with pytest.raises(ValueError, match="attention_mask must be None where attention has a rel"):
        vit.model(**vit.inputs, attention_mask=torch.ones(2, 37))


@kinds
@torch.no_grad()
def test_saved_models_load_without_the_patch(name, tmp_path):
    vit = build(name)
    expected = vit.output()
    tomesd.apply_patch(vit.model, r=3)
    vit.output()
    vit.model.save_pretrained(tmp_path)
    loaded = type(vit.model).from_pretrained(tmp_path).eval()
    vit.model = loaded
    assert torch.equal(vit.output(), expected)


@kinds
def test_the_configuration_is_left_alone(name):
    vit = build(name)
    before = copy.deepcopy(vit.model.config)
    tomesd.apply_patch(vit.model, r=3)
    vit.output()
    assert vit.model.config.to_dict() == before.to_dict()
    assert vit.model.config._attn_implementation == before._attn_implementation
    assert all(
        m.config._attn_implementation == before._attn_implementation
        for m in vit.model.modules()
        if hasattr(m, "config")
    )


@torch.no_grad()
def test_a_video_model_s_attention_is_chosen_while_it_is_patched_as_before():
    vit = build("VideoMAE")
    attention = vit.blocks[0].attention.attention
    own = attention.config
    tomesd.apply_patch(vit.model, r=3)
    merged = vit.output()
    assert attention.config.hidden_size == own.hidden_size
    vit.model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    torch.testing.assert_close(vit.output(), merged, atol=1e-4, rtol=1e-4)
    tomesd.remove_patch(vit.model)
    assert attention.config is own


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_an_interrupted_video_model_still_merges_and_keeps_its_own_attention(error):
    vit = build("VideoMAE")
    plain = vit.output()
    tomesd.apply_patch(vit.model, r=3)
    merged = vit.output()

    def interrupt(module, args):
        raise error

    def run_interrupted():
        hook = vit.blocks[2].attention.attention.value.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            vit.output()
        hook.remove()

    run_interrupted()
    assert torch.equal(vit.output(), merged)
    run_interrupted()
    tomesd.remove_patch(vit.model)
    assert torch.equal(vit.output(), plain)


def test_attention_without_a_bias_is_refused_unless_proportional_attention_is_off():
    vit = build("ViT")
    vit.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"prop_attn must be False .*'flash_attention_2'"):
        tomesd.apply_patch(vit.model, r=3)
    tomesd.apply_patch(vit.model, r=3, prop_attn=False)


def test_backbones_are_refused_unmerge_off_since_their_maps_have_a_place_for_every_token():
    with pytest.raises(ValueError, match=r"unmerge must be True with Dinov2Backbone, .* got False"):
        tomesd.apply_patch(build("DINOv2 backbone").model, r=3, unmerge=False)


@torch.no_grad()
def test_feature_maps_of_backbones_keep_their_shape():
    vit = build("DINOv2 backbone")
    tomesd.apply_patch(vit.model, r=R)
    maps = vit.model(**vit.inputs).feature_maps
    assert [x.shape for x in maps] == [(2, 24, 6, 6)] * 2


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[2])), "windows"),
        (
            lambda: hf.WavLMModel(
                hf.WavLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
            ),
            "which its tokens gate",
        ),
    ],
)
def test_models_whose_tokens_cannot_merge_are_refused_with_the_reason(model, why):
    with pytest.raises(TypeError, match=f"model must not be a .*{why}"):
        tomesd.apply_patch(model(), r=3)


@torch.no_grad()
def test_only_the_vision_half_of_clip_merges():
    config = hf.CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 24,
            "patch_size": 4,
        },
    )
    clip = hf.CLIPModel(config).eval()
    ids, images = torch.randint(0, 100, (1, 7)), torch.randn(1, 3, 24, 24)
    text = clip.get_text_features(ids).pooler_output
    image = clip.get_image_features(images).pooler_output
    tomesd.apply_patch(clip, r=6)
    assert torch.equal(clip.get_text_features(ids).pooler_output, text)
    assert not torch.equal(clip.get_image_features(images).pooler_output, image)
    assert list(tomesd.report(clip).rows) == ["vision_model"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=slow)])
@torch.no_grad()
def test_vit_compiles_to_one_graph_with_merging(backend):
    vit = build("ViT", num_hidden_layers=2)
    tomesd.apply_patch(vit.model, r=9)
    expected = vit.output()
    vit.model = torch.compile(vit.model, fullgraph=True, backend=backend)
    torch.testing.assert_close(vit.output(), expected)


@slow
@torch.no_grad()
def test_an_attention_mask_compiles_to_one_graph_with_merging():
    vit = build("ViT", num_hidden_layers=2)
    vit.inputs["attention_mask"] = torch.ones(2, 37)
    vit.inputs["attention_mask"][:, 30:] = 0
    tomesd.apply_patch(vit.model, r=9)
    expected = vit.output()
    vit.model = torch.compile(vit.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(vit.output(), expected)


@slow
@torch.no_grad()
def test_a_compiled_model_notices_that_it_is_patched_and_restored():
    vit = build("ViT", num_hidden_layers=2)
    plain = vit.output()
    vit.model = torch.compile(vit.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(vit.output(), plain)
    tomesd.apply_patch(vit.model, r=9)
    assert not torch.allclose(vit.output(), plain)
    tomesd.remove_patch(vit.model)
    torch.testing.assert_close(vit.output(), plain)


@torch.no_grad()
def test_a_patch_is_a_set_of_hooks_no_attribute_and_nothing_global_is_replaced():
    """VideoMAE's attention takes no mask, and gets its bias all the same."""
    vit = build("VideoMAE")
    known = set(ALL_ATTENTION_FUNCTIONS.keys())
    before = [dict(vars(module)) for module in vit.model.modules()]
    tomesd.apply_patch(vit.model, r=4)
    vit.output()
    for module, attributes in zip(vit.model.modules(), before, strict=True):
        now = {name: value for name, value in vars(module).items() if name != "_tomesd_patch"}
        assert now.keys() == attributes.keys()
        assert all(now[name] is attributes[name] for name in now)
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == known
