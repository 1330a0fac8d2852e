"""What timm's and torchvision's Vision Transformers do beyond a forward, with merging on."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torchvision.models import swin_t

import tomesd
from tests.support.slow import slow
from tests.support.tiny_vits import TIMM, build
from tests.support.vit_reference import encode, unmerge

R = [3, 0, 9]


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_fused_and_plain_attention_give_the_same(name):
    fused = build(name)
    set_fused_attn(False)
    try:
        plain = build(name)
    finally:
        set_fused_attn(True)
    assert fused.blocks[0].attn.fused_attn
    assert not plain.blocks[0].attn.fused_attn
    for vit in (fused, plain):
        tomesd.apply_patch(vit.model, r=R)
    torch.testing.assert_close(fused.output(), plain.output(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_that_an_attention_mask_hides_count_for_nothing():
    vit = build("timm")
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    mask[0, ..., 20:30] = False
    vit.inputs["attn_mask"] = mask
    seen = {}
    hook = vit.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(first=args[0]), with_kwargs=True
    )
    tomesd.apply_patch(vit.model, r=R)
    out = vit.model.forward_features(**vit.inputs)
    hook.remove()
    tomesd.remove_patch(vit.model)
    for i, tokens in enumerate(seen["first"]):
        hidden = ~mask[i, 0, 0]
        expected = vit.model.norm(unmerge(*encode(tokens, vit.reference, R, 1, hidden=hidden)))
        torch.testing.assert_close(out[i, ~hidden], expected[~hidden], atol=1e-3, rtol=1e-3)


def test_causal_attention_is_refused_where_tokens_merge():
    vit = build("timm")
    tomesd.apply_patch(vit.model, r=3)
    with pytest.raises(ValueError, match="is_causal must be False"):
        vit.model(**vit.inputs, is_causal=True)
    with pytest.raises(ValueError, match="is_causal must be False"):
        vit.blocks[0].attn(torch.randn(2, 37, 24), None, True)


@torch.no_grad()
def test_attention_on_all_tokens_computes_the_same_however_it_is_called():
    vit = build("timm")
    attention, x = vit.blocks[0].attn, torch.randn(2, 37, 24)
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    mask[..., 20:30] = False
    plain, masked = attention(x), attention(x, mask)
    tomesd.apply_patch(vit.model, r=3)
    torch.testing.assert_close(attention(x), plain)
    torch.testing.assert_close(attention(x, mask), masked)
    torch.testing.assert_close(attention(x=x, attn_mask=mask), masked)


@pytest.mark.parametrize("pool", ["avg", "max", "map"])
@torch.no_grad()
def test_pooling_heads_get_every_token(pool):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=2, global_pool=pool
    ).eval()
    seen = []
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    tomesd.apply_patch(model, r=9)
    model(torch.randn(1, 3, 24, 24))
    assert seen == [37]


@torch.no_grad()
def test_other_input_sizes_than_the_model_s_own_merge_as_well():
    model = VisionTransformer(
        img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=2, dynamic_img_size=True
    ).eval()
    tomesd.apply_patch(model, r=5)
    assert model(torch.randn(1, 3, 32, 20)).isfinite().all()
    assert [row.merged for row in tomesd.report(model).rows["VisionTransformer"]] == [36, 31, 26]


@slow
@torch.no_grad()
def test_vit_compiles_to_one_graph_with_merging():
    vit = build("timm with registers")
    tomesd.apply_patch(vit.model, r=R)
    expected = vit.output()
    vit.model = torch.compile(vit.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(vit.output(), expected)


def test_torchvision_s_windows_are_refused_with_the_reason():
    with torch.device("meta"):
        model = swin_t()
    with pytest.raises(TypeError, match=r"model must not be a SwinTransformer: .*windows"):
        tomesd.apply_patch(model, r=3)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin_tiny_patch4_window7_224", "windows"),
    ],
)
def test_models_that_need_token_positions_in_every_layer_are_refused_with_the_reason(name, why):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"model must not be a .*{why}"):
        tomesd.apply_patch(model, r=3)


class InheritingAttention(Attention):
    """With the forward of timm's."""


class ChangedAttention(Attention):
    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().forward(x, **kwargs)


class InheritingBlock(Block):
    """With the forward of timm's."""


class ChangedBlock(Block):
    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().forward(x, **kwargs)


@torch.no_grad()
def test_blocks_and_attention_that_inherit_their_forward_merge_like_timm_s():
    plain, vit = build("timm"), build("timm", block_fn=InheritingBlock)
    for block in vit.blocks:
        block.attn.__class__ = InheritingAttention
    vit.inputs = plain.inputs
    for each in (plain, vit):
        tomesd.apply_patch(each.model, r=R)
    assert torch.equal(vit.output(), plain.output())


def test_blocks_and_attention_with_a_forward_of_their_own_are_refused_by_name():
    vit = build("timm", block_fn=ChangedBlock)
    with pytest.raises(TypeError, match="class that inherits their forward, got ChangedBlock a"):
        tomesd.apply_patch(vit.model, r=3)
    vit = build("timm")
    vit.blocks[1].attn.__class__ = ChangedAttention
    with pytest.raises(TypeError, match="got Block with ChangedAttention as block 1"):
        tomesd.apply_patch(vit.model, r=3)


def test_blocks_without_a_place_between_attention_and_mlp_are_refused():
    model = VisionTransformer(
        img_size=24,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
        block_fn=ParallelScalingBlock,
    )
    with pytest.raises(TypeError, match=r"got ParallelScalingBlock .* as block 0"):
        tomesd.apply_patch(model, r=3)
