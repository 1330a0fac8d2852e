"""Bad input is a clear, typed error before anything is changed."""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_pipelines import sd_pipeline
from tests.support.tiny_unets import predict, sd_unet

# What is given, the error, and all that its message must say: argument, value, what is allowed.
BAD = [
    ({"ratio": -0.1}, ValueError, ["ratio", "-0.1", "at least 0", "below 1"]),
    ({"ratio": 1, "seed": 0}, ValueError, ["ratio", "1", "below 1"]),
    ({"ratio": 1.5}, ValueError, ["ratio", "1.5", "below 1"]),
    ({"ratio": 1, "method": "prune"}, ValueError, ["ratio", "below 1"]),
    ({"ratio": float("nan")}, ValueError, ["ratio", "nan", "below 1"]),
    ({"ratio": float("inf")}, ValueError, ["ratio", "inf", "below 1"]),
    ({"ratio": 0.8, "seed": 0}, ValueError, ["ratio", "0.8", "at most 0.75", "sx·sy = 4"]),
    ({"ratio": 0.6, "sy": 1, "seed": 0}, ValueError, ["0.6", "at most 0.5", "sx·sy = 2"]),
    ({"ratio": 0.9, "sx": 3, "sy": 3, "seed": 0}, ValueError, ["0.9", "at most 0.8889"]),
    ({"ratio": 0.1, "sx": 1, "sy": 1}, ValueError, ["ratio", "0.1", "at most 0"]),
    ({"ratio": 0.6, "preset": "paper"}, ValueError, ["ratio", "0.6", "at most 0.5", "alternating"]),
    ({"ratio": "0.5"}, TypeError, ["ratio", "'0.5'", "float"]),
    ({"ratio": True}, TypeError, ["ratio", "True", "float"]),
    ({"ratio": [0.5]}, TypeError, ["ratio", "[0.5]", "float"]),
    ({"ratio": 0.5j}, TypeError, ["ratio", "0.5j", "float"]),
    ({"ratio": torch.tensor(0.5)}, TypeError, ["ratio", "tensor(0.5000)", "float"]),
    ({"sx": 0}, ValueError, ["sx", "0", "1 or more"]),
    ({"sy": -2}, ValueError, ["sy", "-2", "1 or more"]),
    ({"sx": 2.0}, TypeError, ["sx", "2.0", "int"]),
    ({"sy": True}, TypeError, ["sy", "True", "int"]),
    ({"max_downsample": 0}, ValueError, ["max_downsample", "0", "1 or more"]),
    ({"max_downsample": "1"}, TypeError, ["max_downsample", "'1'", "int"]),
    ({"seed": None}, TypeError, ["seed", "None", "int"]),
    ({"seed": 1.5}, TypeError, ["seed", "1.5", "int"]),
    ({"use_rand": 1}, TypeError, ["use_rand", "1", "bool"]),
    ({"merge_mlp": "yes"}, TypeError, ["merge_mlp", "'yes'", "bool"]),
    ({"prop_attn": None}, TypeError, ["prop_attn", "None", "bool"]),
    ({"keep_norm": 1}, TypeError, ["keep_norm", "1", "bool"]),
    ({"refine": -1}, ValueError, ["refine", "-1", "0 or more"]),
    ({"refine": 0.5}, TypeError, ["refine", "0.5", "int"]),
    ({"merge_attn": False}, ValueError, ["merge_attn", "merge_crossattn", "merge_mlp", "False"]),
    ({"merge_attn": False, "ratio": 0}, ValueError, ["merge_attn", "merge_crossattn"]),
    ({"method": "kmeans"}, ValueError, ["method", "'kmeans'", "tome, prune"]),
    ({"method": 3}, TypeError, ["method", "3", "str"]),
    ({"partition": "random"}, ValueError, ["partition", "'random'", "strided, alternating"]),
    ({"only_where_it_pays": "often"}, ValueError, ["only_where_it_pays", "'often'", "coarser"]),
    ({"preset": "turbo"}, ValueError, ["preset", "'turbo'", "quality, fast, late, steady, paper"]),
    ({"merge_cross_attn": True}, TypeError, ["merge_cross_attn", "merge_crossattn"]),
    ({"r": 8}, TypeError, ["UNet2DConditionModel", "ratio", "r "]),
]


@pytest.mark.parametrize(("given", "error", "says"), BAD, ids=lambda value: str(value)[:60])
def test_bad_settings_are_refused_and_leave_the_model_as_it_was(given, error, says):
    unet = sd_unet()
    attributes = [sorted(vars(module)) for module in unet.modules()]
    with pytest.raises(error) as caught:
        tomesd.apply_patch(unet, **given)
    for words in says:
        assert words in str(caught.value)
    assert count_hooks(unet) == 0
    assert [sorted(vars(module)) for module in unet.modules()] == attributes


def test_bad_settings_leave_an_earlier_patch_working():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.25)
    before = predict(unet)
    for given, error, _ in BAD:
        with pytest.raises(error):
            tomesd.apply_patch(unet, **given)
    assert torch.equal(predict(unet), before)


def test_settings_by_position_are_those_of_tomesd_0_1_3():
    with pytest.raises(TypeError, match="settings by position must be at most max_downsample, sx"):
        tomesd.apply_patch(sd_unet(), 0.5, 1, 2, 2, True, True, False, False, 0)
    with pytest.raises(TypeError, match="sx must be given once"):
        tomesd.apply_patch(sd_unet(), 0.5, 1, 2, sx=2)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (AutoencoderKL, "AutoencoderKL"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: "a model", "'a model'"),
        (lambda: None, "None"),
        (lambda: UNet2DConditionModel, "<class"),
        (lambda: [1], "a list"),
        (lambda: {"unet": 1}, "a dict"),
        (lambda: Path("model"), "a PosixPath"),
    ],
)
def test_what_is_not_supported_is_named_with_what_is_wanted(make, name):
    model = make()
    with pytest.raises(TypeError) as caught:
        tomesd.apply_patch(model)
    assert f"got {name}" in str(caught.value)
    wanted = r"tomesd\.supported\(\)|must be a diffusers pipeline or a torch module"
    assert re.search(wanted, str(caught.value))
    assert len(str(caught.value)) <= 300
    with pytest.raises(TypeError), tomesd.patched(model):
        pass
    if isinstance(model, torch.nn.Module):
        assert count_hooks(model) == 0


def _blocks(unet) -> list:
    return [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]


def test_a_model_of_a_release_that_changed_its_parts_is_refused_with_those_that_are_known():
    unet = sd_unet()
    block = _blocks(unet)[0]
    block.self_attention = block.attn1
    del block.attn1
    with pytest.raises(TypeError) as caught:
        tomesd.apply_patch(unet)
    for words in ("UNet2DConditionModel", "diffusers 0.36 to 0.42", diffusers.__version__, "attn1"):
        assert words in str(caught.value)
    assert count_hooks(unet) == 0


def test_feed_forward_chunking_together_with_a_merged_mlp_is_refused():
    unet = sd_unet()
    for block in _blocks(unet):
        block.set_chunk_feed_forward(1)
    with pytest.raises(ValueError, match=r"merge_mlp must be False .* got True"):
        tomesd.apply_patch(unet, merge_mlp=True)
    assert count_hooks(unet) == 0
    # Without a merged MLP, the two go together.
    expected = predict(tomesd.apply_patch(sd_unet(), merge_attn=True))
    got = predict(tomesd.apply_patch(unet, merge_attn=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_feed_forward_chunking_together_with_a_merged_block_is_refused():
    unet = sd_unet()
    for block in _blocks(unet):
        block.set_chunk_feed_forward(1)
    with pytest.raises(ValueError, match=r"merge_block must be False .* got True"):
        tomesd.apply_patch(unet)
    assert count_hooks(unet) == 0


@pytest.mark.parametrize("dim", [0, 1])
def test_chunking_that_is_switched_on_later_is_an_error_and_no_wrong_picture(dim):
    unet = tomesd.apply_patch(sd_unet(), merge_mlp=True)
    for block in _blocks(unet):
        block.set_chunk_feed_forward(1, dim)
    with pytest.raises(ValueError, match="must be of shape"):
        predict(unet)


def test_fused_projections_need_prop_attn_off():
    unet = sd_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"merge_queries must be True .* got False"):
        tomesd.apply_patch(unet, merge_queries=False)
    assert count_hooks(unet) == 0


@pytest.mark.parametrize("ratio", [np.float64(0.5), np.float32(0.5), np.array([0.5])[0]])
def test_numbers_of_numpy_are_numbers(ratio):
    expected = predict(tomesd.apply_patch(sd_unet(), ratio=0.5, seed=3, use_rand=True))
    unet = tomesd.apply_patch(
        sd_unet(), ratio=ratio, seed=np.int64(3), sx=np.int32(2), use_rand=True
    )
    assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize(("sx", "sy"), [(2, 2), (3, 1), (1, 7), (3, 3), (4, 2)])
def test_the_largest_ratio_that_an_error_names_is_allowed(sx, sy):
    unet = sd_unet()
    with pytest.raises(ValueError, match="ratio must be at most") as caught:
        tomesd.apply_patch(unet, ratio=0.99, sx=sx, sy=sy, seed=0)
    limit = float(re.search(r"at most ([\d.]+)", str(caught.value)).group(1))
    assert limit == pytest.approx(1 - 1 / (sx * sy), abs=1e-4)
    tomesd.apply_patch(unet, ratio=1 - 1 / (sx * sy), sx=sx, sy=sy)
    assert predict(unet).isfinite().all()


@pytest.mark.parametrize("make", [sd_unet, sd_pipeline])
def test_a_report_on_what_is_not_patched_is_an_error(make):
    model = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"patched, got a {type(model).__name__} without"):
            tomesd.report(model)
        tomesd.remove_patch(tomesd.apply_patch(model))


def test_a_block_that_is_called_without_its_model_says_what_it_lacks():
    unet = tomesd.apply_patch(sd_unet())
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(1, 16, 16), torch.randn(1, 5, unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="call the model, or remove_patch to call single blocks"):
        block(x, encoder_hidden_states=text)
    tomesd.remove_patch(unet)
    assert block(x, encoder_hidden_states=text).isfinite().all()
