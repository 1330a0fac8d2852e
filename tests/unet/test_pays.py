"""Merging only where there are tokens enough, or where it pays: by shapes, and never in silence."""

import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import tomesd
from tests.support.tiny_unets import predict, sd_unet, unet_inputs


def rows(unet) -> dict[str, tuple[int, int, str]]:
    (found,) = tomesd.report(unet).rows.values()
    return {row.where: (row.tokens, row.merged, row.note) for row in found}


def test_min_tokens_goes_by_the_picture_at_hand():
    unet = tomesd.apply_patch(sd_unet(), min_tokens=140, max_downsample=8)
    predict(unet, h=10, w=14)
    assert rows(unet) == {
        "1/1 down_blocks.0": (140, 70, ""),
        "1/2 down_blocks.1": (35, 35, "fewer than min_tokens=140"),
        "1/4 mid_block": (12, 12, "fewer than min_tokens=140"),
        "1/2 up_blocks.1": (35, 35, "fewer than min_tokens=140"),
        "1/1 up_blocks.2": (140, 70, ""),
    }
    predict(unet, h=20, w=28)
    assert {where: merged for where, (_, merged, _) in rows(unet).items()} == {
        "1/1 down_blocks.0": 280,
        "1/2 down_blocks.1": 70,
        "1/4 mid_block": 35,
        "1/2 up_blocks.1": 70,
        "1/1 up_blocks.2": 280,
    }


@pytest.mark.parametrize("settings", [{"min_tokens": 141}, {"only_where_it_pays": True}], ids=str)
@pytest.mark.parametrize("branches", [{}, {"merge_queries": False}, {"merge_block": True}], ids=str)
def test_where_nothing_merges_the_picture_is_the_unpatched_one_and_one_warning_says_so(
    settings, branches
):
    unet = sd_unet()
    before = predict(unet, h=10, w=14)
    tomesd.apply_patch(unet, max_downsample=8, **settings, **branches)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert torch.equal(predict(unet, h=10, w=14), before)
        predict(unet, h=10, w=14)
    (warning,) = found
    assert "nothing merges in UNet2DConditionModel: " in str(warning.message)


def test_explicit_settings_merge_also_where_it_does_not_pay():
    unet = tomesd.apply_patch(sd_unet())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(unet, h=10, w=14)
    assert rows(unet)["1/1 down_blocks.0"] == (140, 70, "")


def test_what_would_not_pay_is_left_alone_and_the_report_says_why():
    unet = tomesd.apply_patch(sd_unet(), only_where_it_pays=True, max_downsample=8)
    sizes = {8: "would cost more time than it saves", 128: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for side, note in sizes.items():
            predict(unet, batch=1, h=side, w=side)
            assert rows(unet)["1/1 down_blocks.0"][2] == note


def test_the_finest_level_can_be_kept_where_only_coarser_ones_must_pay():
    unet = tomesd.apply_patch(sd_unet(), only_where_it_pays="coarser", max_downsample=8)
    predict(unet, batch=1, h=8, w=8)
    dear = "would cost more time than it saves"
    found = {where: note for where, (_, _, note) in rows(unet).items()}
    assert found == {
        "1/1 down_blocks.0": "",
        "1/2 down_blocks.1": dear,
        "1/4 mid_block": dear,
        "1/2 up_blocks.1": dear,
        "1/1 up_blocks.2": "",
    }


def test_the_fast_preset_merges_whole_blocks_at_every_level_where_that_pays():
    unet = tomesd.apply_patch(sd_unet(), preset="fast")
    predict(unet, batch=1, h=64, w=64)
    dear = "would cost more time than it saves"
    assert rows(unet) == {
        "1/1 down_blocks.0": (4096, 2048, ""),
        "1/2 down_blocks.1": (1024, 512, ""),
        "1/4 mid_block": (256, 256, dear),
        "1/2 up_blocks.1": (1024, 512, ""),
        "1/1 up_blocks.2": (4096, 2048, ""),
    }
    assert unet._tomesd_patch.settings.merge_block


@pytest.mark.parametrize("name", ["min_tokens", "window"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got -1"):
        tomesd.apply_patch(sd_unet(), **{name: -1})


def test_trace_leaves_out_what_does_not_merge():
    unet = tomesd.apply_patch(sd_unet(), min_tokens=140, max_downsample=8)
    with tomesd.trace(unet) as traced:
        predict(unet, h=10, w=14)
    assert {each.group.shape[1] for each in traced} == {140}


def test_a_map_made_without_gradients_serves_in_training_too():
    # What is kept from one call to the next must not be an inference tensor.
    unet = tomesd.apply_patch(sd_unet())
    with torch.inference_mode():
        predict(unet, h=6, w=22)
    inputs = unet_inputs(unet, h=6, w=22)
    unet(**inputs).sample.mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "channels", "text", "share"),
    [
        (96, 384, "image_proj", 0.135),
        (128, 384, "image_proj", 0.176),
        (64, 704, "text_proj", 0.090),
    ],
    ids=["Kandinsky 2.2 at 768 px", "Kandinsky 2.2 at 1024 px", "DeepFloyd IF"],
)
def test_attention_without_a_transformer_around_it_is_a_small_share_of_the_work(
    side, channels, text, share
):
    """Of the multiplications, with all of its projections of image tokens: docs/performance.md."""
    width = 768 if text == "image_proj" else 2816
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=tuple(channels * level for level in (1, 2, 3, 4)),
            down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
            up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            layers_per_block=3,
            attention_head_dim=64,
            cross_attention_dim=width,
            encoder_hid_dim=1280,
            encoder_hid_dim_type=text,
            addition_embed_type="image" if text == "image_proj" else None,
            resnet_time_scale_shift="scale_shift",
        )
        given = {"encoder_hidden_states": torch.empty(2, 77, 1280)}
        if text == "image_proj":
            given = {"added_cond_kwargs": {"image_embeds": torch.empty(2, 1280)}}
            given["encoder_hidden_states"] = None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.empty(2, 4, side, side), torch.empty(2), **given)
    counts = {
        name.partition(".")[2]: sum(each.values())
        for name, each in counter.get_flop_counts().items()
    }
    own = [name for name, module in unet.named_modules() if type(module).__name__ == "Attention"]
    of_text = sum(counts[f"{name}.add_{part}_proj"] for name in own for part in "kv")
    attention = sum(counts[name] for name in own) - of_text
    assert attention / counter.get_total_flops() == pytest.approx(share, abs=0.003)
