"""Vision towers that pack all pictures into one sequence merge within their blocks."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import tomesd
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


TOWERS = {"Qwen2-VL": _qwen2, "Qwen3-VL": _qwen3}
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
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_each_picture_merges_within_each_block(name, attention):
    model, (patches, grid) = build(name, attention), pictures(6, 6)
    seen: dict[str, Any] = {}
    hook = model.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    plain = model(patches, grid_thw=grid).last_hidden_state
    hook.remove()
    tomesd.apply_patch(model, r=[11, 15], within_blocks=True)
    given, taken = inputs_and_outputs(model.blocks, lambda: model(patches, grid_thw=grid))
    merged = model(patches, grid_thw=grid)
    assert merged.last_hidden_state.shape == plain.shape
    assert not torch.equal(merged.last_hidden_state, plain)
    tomesd.remove_patch(model)
    assert torch.equal(model(patches, grid_thw=grid).last_hidden_state, plain)
    cos, sin = (table[:36] for table in seen["position_embeddings"])
    for block, r, x, y in zip(model.blocks, [11, 15], given, taken, strict=True):
        for tokens, got in zip(x.split(36), y.split(36), strict=True):
            want = expected_block(tokens, describe(block, cos, sin), r)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@towers
@torch.no_grad()
def test_pictures_of_different_sizes_go_one_at_a_time(name):
    model, (patches, grid) = build(name), pictures(6, 4)
    tomesd.apply_patch(model, r=5, within_blocks=True)
    with pytest.raises(ValueError, match=r"grid_thw must have equally many tokens .*\[36, 16\]"):
        model(patches, grid_thw=grid)
    assert model(patches[:36], grid_thw=grid[:1]).pooler_output.shape == (9, 16)
    assert model(patches[36:], grid_thw=grid[1:]).pooler_output.shape == (4, 16)


@towers
def test_towers_whose_merger_needs_the_grid_are_refused_without_within_blocks(name):
    with pytest.raises(ValueError, match=r"within_blocks must be True with Qwen.*patch merger"):
        tomesd.apply_patch(build(name), r=5)
