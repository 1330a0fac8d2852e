"""Which levels merge: counted from the finest one that has something to merge."""

import pytest
import torch

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_unets import controlnet, predict, sd_unet, sdxl_unet, unet_inputs


def _merging(unet, **settings) -> dict[str, bool]:
    """Which transformers of the model merge, by their place in it."""
    return _merging_rows(tomesd.apply_patch(unet, ratio=0.5, **settings))


def _merging_rows(unet) -> dict[str, bool]:
    (rows,) = tomesd.report(unet).rows.values()
    return {row.where: row.merged < row.tokens for row in rows}


@pytest.mark.parametrize(
    ("max_downsample", "levels"),
    [(1, {1}), (2, {1, 2}), (3, {1, 2}), (4, {1, 2, 4}), (8, {1, 2, 4})],
)
def test_max_downsample_counts_levels_of_a_stable_diffusion_unet(max_downsample, levels):
    merging = _merging(sd_unet(), max_downsample=max_downsample)
    assert merging == {
        "1/1 down_blocks.0": 1 in levels,
        "1/2 down_blocks.1": 2 in levels,
        "1/4 mid_block": 4 in levels,
        "1/2 up_blocks.1": 2 in levels,
        "1/1 up_blocks.2": 1 in levels,
    }


@pytest.mark.parametrize(("max_downsample", "levels"), [(1, {2}), (2, {2, 4}), (8, {2, 4})])
def test_max_downsample_counts_from_the_finest_level_with_attention(max_downsample, levels):
    # Like SDXL, whose first transformers sit at half resolution.
    unet = sdxl_unet()
    before = predict(unet)
    assert _merging(unet, max_downsample=max_downsample) == {
        "1/2 down_blocks.1": 2 in levels,
        "1/4 down_blocks.2": 4 in levels,
        "1/4 mid_block": 4 in levels,
        "1/4 up_blocks.0": 4 in levels,
        "1/2 up_blocks.1": 2 in levels,
    }
    assert not torch.equal(predict(unet), before)


def test_a_controlnet_merges_at_the_levels_of_its_unet():
    unet = sd_unet()
    net = tomesd.apply_patch(controlnet(unet))
    # A ControlNet does not say for which size it was made.
    (rows,) = tomesd.report(net).rows.values()
    assert [row.tokens for row in rows] == [0, 0, 0]
    net(**unet_inputs(unet), controlnet_cond=torch.zeros(2, 3, 80, 112))
    assert _merging_rows(net) == {
        "1/1 down_blocks.0": True,
        "1/2 down_blocks.1": False,
        "1/4 mid_block": False,
    }


def test_levels_without_self_attention_are_passed_over():
    # As in Stable Diffusion's upscaler, whose finer levels attend to the text only.
    unet = sd_unet(only_cross_attention=(True, False, False))
    assert _merging(unet, merge_attn=True) == {
        "1/1 down_blocks.0": False,
        "1/2 down_blocks.1": True,
        "1/4 mid_block": False,
        "1/2 up_blocks.1": True,
        "1/1 up_blocks.2": False,
    }


def test_blocks_without_self_attention_merge_their_other_branches():
    unet = sd_unet(only_cross_attention=(True, False, False))
    before = predict(unet)
    assert _merging(unet, merge_mlp=True)["1/1 down_blocks.0"]
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    assert (len(block.attn1._forward_pre_hooks), len(block.ff._forward_pre_hooks)) == (0, 1)
    (rows,) = tomesd.report(unet).rows.values()
    assert rows[0].work == 1.0
    assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(tomesd.remove_patch(unet)), before)


ATTENDS_TO_TEXT_ONLY = {"only_cross_attention": True, "mid_block_type": None}


def test_a_model_without_any_self_attention_to_merge_is_refused():
    unet = sd_unet(**ATTENDS_TO_TEXT_ONLY)
    with pytest.raises(ValueError, match=r"nothing would be merged .* no self-attention"):
        tomesd.apply_patch(unet, merge_attn=True)
    assert count_hooks(unet) == 0
    tomesd.apply_patch(unet, ratio=0)
    tomesd.apply_patch(unet, merge_crossattn=True)
    assert count_hooks(unet) > 0


def test_a_model_without_attention_is_refused():
    unet = sd_unet(
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match=r"nothing would be merged .* no attention"):
        tomesd.apply_patch(unet)
    assert count_hooks(unet) == 0
    before = predict(unet)
    assert torch.equal(predict(tomesd.apply_patch(unet, ratio=0)), before)


def test_attention_of_another_kind_is_left_alone_and_reported():
    unet = sd_unet(
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=4,
    )
    assert not _merging(unet)["1/1 down_blocks.0"]
    (rows,) = tomesd.report(unet).rows.values()
    assert "its attention has no transformer around it" in rows[0].note
    assert _merging(unet)["1/1 up_blocks.2"]


def test_a_pipeline_is_left_alone_if_one_of_its_models_cannot_merge():
    unet = sd_unet()
    refused = sd_unet(**ATTENDS_TO_TEXT_ONLY)
    both = torch.nn.ModuleList([unet, refused])
    before = predict(tomesd.apply_patch(unet, ratio=0.25))
    count = count_hooks(unet)
    with pytest.raises(ValueError, match="nothing would be merged"):
        tomesd.apply_patch(both, merge_attn=True)
    assert (count_hooks(unet), count_hooks(refused)) == (count, 0)
    assert torch.equal(predict(unet), before)
