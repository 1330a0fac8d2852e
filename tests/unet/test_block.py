"""One merge around a whole block: what it computes, and that nothing else is disturbed."""

import pytest
import torch
from torch import nn

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_unets import predict, sd_unet, sdxl_unet, unet_inputs
from tomesd import TokenMap
from tomesd.diffusion.block import Place

WHOLE = {"merge_block": True, "max_downsample": 8}


def first_block(unet) -> nn.Module:
    return unet.down_blocks[0].attentions[0].transformer_blocks[0]


def noted(module: nn.Module, calls: list) -> None:
    """Append what a module gets and gives; hooks that were there before have had their turn."""

    def note(module, args, kwargs, output):
        calls.append((args, kwargs, output))

    module.register_forward_hook(note, with_kwargs=True)


@pytest.mark.parametrize("prop_attn", [False, True])
def test_a_block_adds_to_every_token_what_its_group_was_given(prop_attn):
    unet, plain = (sd_unet().double() for _ in range(2))
    seen, inside, maps = [], [], []
    first_block(unet).register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    tomesd.apply_patch(unet, prop_attn=prop_attn, merge_block=True)
    noted(first_block(unet), seen)
    noted(first_block(unet).attn1, inside)
    with tomesd.trace(unet) as traced:
        predict(unet)
    maps = [
        each for each in traced if each.where == "down_blocks.0.attentions.0.transformer_blocks.0"
    ]
    x, (_, kwargs, output) = seen
    token_map = TokenMap.from_groups(maps[0].group)

    block = first_block(plain)
    merged = token_map.merge(x)
    if prop_attn:
        # Attention weighs a group by its size: each key as often as it has members.
        bias = token_map.size.double().log().transpose(1, 2)
        block.attn1.register_forward_pre_hook(
            lambda attn, args, kwargs: (args, kwargs | {"attention_mask": bias}), with_kwargs=True
        )
    with torch.no_grad():
        alone = block(merged, encoder_hidden_states=kwargs["encoder_hidden_states"])
    expected = x + token_map.unmerge(alone) - token_map.unmerge(merged)
    torch.testing.assert_close(output, expected)
    assert inside[0][0][0].shape[1] == x.shape[1] // 2


@pytest.mark.parametrize("make", [sd_unet, sdxl_unet])
def test_merging_tokens_that_are_equal_changes_nothing_but_rounding(make):
    unet = make().double()
    inputs = unet_inputs(unet, h=8, w=8)
    # A picture of flat cells stays one only without convolutions: the block itself is called.
    block = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    cells = torch.randn(2, 4, 1, 4, 1, block.norm1.normalized_shape[0], dtype=torch.float64)
    x = cells.expand(2, 4, 2, 4, 2, -1).reshape(2, 64, -1)
    text = inputs["encoder_hidden_states"]
    with torch.no_grad():
        expected = block(x, encoder_hidden_states=text)
        tomesd.apply_patch(unet, ratio=0.75, **WHOLE)
        place = {"tomesd_place": Place(((1, 8, 8),), torch.tensor(500))}
        got = block(x, encoder_hidden_states=text, cross_attention_kwargs=place)
    torch.testing.assert_close(got, expected)


def test_every_branch_sees_fewer_tokens():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.5, merge_block=True)
    block, lengths = first_block(unet), {}
    for name in ("norm1", "attn1", "attn2", "norm3", "ff"):
        getattr(block, name).register_forward_pre_hook(
            lambda module, args, name=name: lengths.update({name: args[0].shape[1]})
        )
    predict(unet, h=10, w=14)
    assert lengths == dict.fromkeys(("norm1", "attn1", "attn2", "norm3", "ff"), 70)


def test_removing_it_restores_the_output_bit_for_bit():
    unet = sd_unet()
    before = predict(unet)
    tomesd.apply_patch(unet, **WHOLE)
    assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(tomesd.remove_patch(unet)), before)
    assert count_hooks(unet) == 0


def test_dropped_tokens_pass_a_block_unchanged():
    unet = sd_unet()
    seen = []
    first_block(unet).register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    tomesd.apply_patch(unet, method="prune", merge_block=True)
    first_block(unet).register_forward_hook(lambda block, args, output: seen.append(output))
    predict(unet, h=10, w=14)
    x, output = seen
    assert ((x == output).all(-1).sum(1) == 70).all()


@pytest.mark.parametrize(
    "settings",
    [{"merge_attn": False, "merge_mlp": True}, {"merge_queries": False}, {"keep_norm": False}],
    ids=str,
)
def test_what_contradicts_it_is_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name} must be True with merge_block=True"):
        tomesd.apply_patch(sd_unet(), merge_block=True, **settings)


def test_naming_a_branch_merges_branch_by_branch():
    # As the papers and other plugins do, whose settings keep their meaning.
    named = (
        {"merge_attn": True},
        {"merge_mlp": True},
        {"merge_queries": False},
        {"keep_norm": False},
    )
    for settings in named:
        unet = tomesd.apply_patch(sd_unet(), **settings)
        assert not unet._tomesd_patch.settings.merge_block
    assert tomesd.apply_patch(sd_unet())._tomesd_patch.settings.merge_block


def test_masks_of_an_ip_adapter_are_refused_where_cross_attention_merges():
    unet = tomesd.apply_patch(sd_unet())
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}}
    with pytest.raises(ValueError, match="merge_block must be False with ip_adapter_masks"):
        unet(**unet_inputs(unet), **masks)
