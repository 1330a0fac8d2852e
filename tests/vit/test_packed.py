"""Vision towers that pack all pictures into one sequence merge each picture for itself."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import tomesd
from tests.support import tiny_vits
from tests.support.slow import slow
from tests.support.tiny_vits_base import HEADS, WIDTH, heads
from tests.support.tiny_vits_rotary import rotating
from tests.support.vit_reference import Block
from tests.vit.test_within_blocks import expected_block, inputs_and_outputs

PATCH = 3 * 2 * 4 * 4  # Channels of two frames of 4×4 pixels.


def _qwen2(attention: str) -> Any:
    config = hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=2,
        embed_dim=WIDTH,
        hidden_size=16,
        num_heads=HEADS,
        mlp_ratio=2,
        patch_size=4,
        attn_implementation=attention,
    )
    return Qwen2VisionTransformerPretrainedModel(config)


def _qwen2_5(attention: str) -> Any:
    config = hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=WIDTH,
        out_hidden_size=16,
        num_heads=HEADS,
        intermediate_size=2 * WIDTH,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=[0, 2],
        attn_implementation=attention,
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def _qwen3(attention: str) -> Any:
    config = hf.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
        depth=2,
        hidden_size=WIDTH,
        out_hidden_size=16,
        num_heads=HEADS,
        intermediate_size=2 * WIDTH,
        patch_size=4,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0],
        attn_implementation=attention,
    )
    return hf.Qwen3VLVisionModel(config)


TOWERS = {"Qwen2-VL": _qwen2, "Qwen2.5-VL": _qwen2_5, "Qwen3-VL": _qwen3}
SIZES = {"sdpa": (6, 6, 4), "eager": (4, 6)}
towers = pytest.mark.parametrize("name", TOWERS)


def build(name: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = TOWERS[name](attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


def pictures(*sizes: int) -> tuple[Tensor, Tensor]:
    """Patches of square pictures with so many along a side, and their grids."""
    grid = torch.tensor([[1, size, size] for size in sizes])
    return torch.randn(int(grid.prod(1).sum()), PATCH), grid


def merging_blocks(model: Any) -> list[nn.Module]:
    """In Qwen2.5-VL, those without windows."""
    return [model.blocks[i] for i in getattr(model, "fullatt_block_indexes", range(2))]


def describe(block: Any, cos: Tensor, sin: Tensor) -> Block:
    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads(part) for part in block.attn.qkv(x).chunk(3, dim=-1))

    return Block(
        block.norm1,
        qkv,
        block.attn.proj,
        lambda x: block.mlp(block.norm2(x)),
        rotating(cos, sin),
    )


@towers
@pytest.mark.parametrize("attention", SIZES)
@torch.no_grad()
def test_each_picture_merges_within_each_block_whatever_its_size(name, attention):
    model, (patches, grid) = build(name, attention), pictures(*SIZES[attention])
    blocks = merging_blocks(model)
    seen: dict[str, Any] = {}
    hook = blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    plain = model(patches, grid_thw=grid).last_hidden_state
    hook.remove()
    tomesd.apply_patch(model, r=[11, 15], within_blocks=True)
    given, taken = inputs_and_outputs(blocks, lambda: model(patches, grid_thw=grid))
    merged = model(patches, grid_thw=grid)
    assert merged.last_hidden_state.shape == plain.shape
    assert not torch.equal(merged.last_hidden_state, plain)
    tomesd.remove_patch(model)
    assert torch.equal(model(patches, grid_thw=grid).last_hidden_state, plain)
    lengths = grid.prod(1).tolist()
    tables = zip(*(table.split(lengths) for table in seen["position_embeddings"]), strict=True)
    tables = list(tables)
    for block, r, x, y in zip(blocks, [11, 15], given, taken, strict=True):
        for tokens, got, table in zip(x.split(lengths), y.split(lengths), tables, strict=True):
            want = expected_block(tokens, describe(block, *table), r)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_blocks_of_windows_see_every_token():
    model, (patches, grid) = build("Qwen2.5-VL"), pictures(6, 4)
    tomesd.apply_patch(model, r=5, within_blocks=True)
    seen = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda norm, args: seen.append(args[0].shape))
    model(patches, grid_thw=grid)
    assert seen == [(52, WIDTH)]
    (rows,) = tomesd.report(model).rows.values()
    assert [(row.tokens, row.merged) for row in rows] == [(52, 42), (52, 42)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"prop_attn": False}, {"order": "concatenated"}])
@torch.no_grad()
def test_pictures_of_any_size_that_a_mask_keeps_apart_merge_as_if_alone(attention, settings):
    vit = tiny_vits.build("Pixtral", attn_implementation=attention)
    model, pictures = vit.model, torch.randn(3, 3, 24, 24)
    sizes = [(24, 24), (16, 24), (16, 24)]
    for ways in ({}, {"within_blocks": True}, {"unmerge": False}):
        tomesd.apply_patch(model, r=[5, 0, 7], **settings, **ways)
        alone = [
            model(picture[None, :, :height, :width]).last_hidden_state
            for picture, (height, width) in zip(pictures, sizes, strict=True)
        ]
        got = model(pictures, image_sizes=torch.tensor(sizes)).last_hidden_state
        torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
        (rows,) = tomesd.report(model).rows.values()
        left = [69, 84, 63] if "within_blocks" in ways else [69, 69, 48]
        assert [row.merged for row in rows] == left


def test_pictures_in_one_sequence_need_a_mask_that_keeps_them_apart():
    model = tiny_vits.build("Pixtral").model
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation must be eager or sdpa with Pixtral"):
        tomesd.apply_patch(model, r=5, prop_attn=False)


@towers
def test_towers_whose_merger_needs_the_grid_are_refused_without_within_blocks(name):
    with pytest.raises(ValueError, match=r"within_blocks must be True with Qwen.*patch merger"):
        tomesd.apply_patch(build(name), r=5)


def several(name: str) -> tuple[nn.Module, Any]:
    """A model, and a call of it with pictures of these sizes, in patches."""
    if name == "Pixtral":
        model = tiny_vits.build(name).model

        def call(*sizes: int) -> Tensor:
            images = torch.ones(len(sizes), 3, 24, 24) * torch.linspace(0, 1, 24)
            given = torch.tensor([[4 * size, 24] for size in sizes])
            return model(images, image_sizes=given).last_hidden_state

        return model, call
    model = build(name)

    def packed(*sizes: int) -> Tensor:
        torch.manual_seed(1)
        patches, grid = pictures(*sizes)
        return model(patches, grid_thw=grid).last_hidden_state

    return model, packed


@pytest.mark.parametrize(
    ("name", "within_blocks"),
    [("Pixtral", False), ("Pixtral", True), ("Qwen2-VL", True), ("Qwen2.5-VL", True)],
)
def test_pictures_of_any_sizes_train_with_checkpointing(name, within_blocks):
    def gradients(checkpointing: bool) -> list[Tensor]:
        model, call = several(name)
        tomesd.apply_patch(model, r=5, within_blocks=within_blocks)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        # The first forward's backward pass comes after another forward with other pictures.
        first = call(6, 4)
        call(4, 4, 6)
        first.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)


@slow
@torch.no_grad()
def test_a_compiled_graph_takes_one_masked_picture_and_refuses_several():
    model, _ = several("Pixtral")
    tomesd.apply_patch(model, r=5)
    images = torch.randn(2, 3, 24, 24)
    expected = model(images[:1]).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images[:1]).last_hidden_state, expected)
    with pytest.raises(Exception, match="pixel_values must be of one picture"):
        compiled(images)
