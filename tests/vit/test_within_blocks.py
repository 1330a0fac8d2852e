"""With within_blocks=True, each block merges for itself, and gets and gives all tokens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from timm.models.hiera import Hiera
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

import tomesd
from tests.support.recorders import count_hooks
from tests.support.slow import slow
from tests.support.tiny_vits import FAMILIES, build, enable_checkpointing
from tests.support.tiny_vits_base import HEADS, WIDTH, heads, tokens_of
from tests.support.vit_reference import Block, merge_into, merged, unmerge
from tests.vit.test_families import patched_encoder

families = pytest.mark.parametrize("name", FAMILIES)
R = [7, 0, 15]


def expected_block(
    tokens: Tensor, block: Block, r: int, prefix: int = 0, suffix: int = 0
) -> Tensor:
    """x + unmerge(block(merge(x)) - merge(x)), from the definitions, for one sample [N, C]."""
    n = len(tokens)
    into = merge_into(tokens[: n - suffix], r, prefix)
    few, size, groups = merged(tokens, [1.0] * n, [[i] for i in range(n)], into)
    seen = few if block.extra is None else torch.cat([few, block.extra(few)])
    q, k, v = block.qkv(block.before_attention(seen))
    logits = block.logits(q, k, [group[0] for group in groups])
    logits[:, :, : len(few)] += torch.tensor(size).log()
    branch = block.after_attention((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    x = block.after[0](few + branch[: len(few)])
    x = block.after[1](x + block.mlp(x))
    return tokens + unmerge(x - few, groups)


def inputs_and_outputs(blocks: Any, call: Callable[[], Any]) -> tuple[list, list]:
    """What blocks get and give, hooked before the patch and after it, as a user sees them."""
    given, taken, handles = [], [], []
    for block in blocks:
        handles += [
            block.register_forward_pre_hook(lambda _, args: given.append(args[0]), prepend=True),
            block.register_forward_hook(lambda _, args, out: taken.append(tokens_of(out))),
        ]
    call()
    for handle in handles:
        handle.remove()
    return given, taken


@families
@torch.no_grad()
def test_each_block_adds_what_it_changes_in_its_merged_tokens(name):
    vit = build(name)
    plain, hooks = vit.output(), count_hooks(vit.model)
    tomesd.apply_patch(vit.model, r=R, within_blocks=True)
    given, taken = inputs_and_outputs(vit.blocks, vit.output)
    assert not torch.equal(vit.output(), plain)
    tomesd.remove_patch(vit.model)
    for block, r, x, y in zip(vit.reference, R, given, taken, strict=True):
        for tokens, got in zip(x, y, strict=True):
            want = expected_block(tokens, block, r, vit.prefix, vit.suffix)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(vit.output(), plain)
    assert count_hooks(vit.model) == hooks


@families
@torch.no_grad()
def test_r_0_within_blocks_changes_nothing_bit_for_bit(name):
    vit = build(name)
    expected = vit.output()
    tomesd.apply_patch(vit.model, r=0, within_blocks=True)
    assert torch.equal(vit.output(), expected)


@pytest.mark.parametrize(
    "name", ["ViT", "timm", "torchvision", "VideoMAE", "timm EVA-02", "timm BEiT"]
)
def test_training_with_checkpointing_gives_the_same_gradients_within_blocks(name):
    def gradients(checkpointing: bool) -> list[Tensor]:
        vit = build(name)
        tomesd.apply_patch(vit.model, r=R, within_blocks=True)
        if checkpointing:
            enable_checkpointing(name, vit)
            vit.model.train()
        # The first forward's backward pass comes after another forward.
        first = vit.output()
        inputs = dict(vit.inputs)
        vit.inputs = {key: x.flip(0) for key, x in inputs.items()}
        vit.output()
        first.square().mean().backward()
        return [p.grad for p in vit.model.parameters() if p.grad is not None]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_tokens_that_an_attention_mask_hides_count_for_nothing_within_blocks():
    vit = build("ViT")
    mask = torch.ones(2, 37)
    mask[:, 20:] = 0
    vit.inputs["attention_mask"] = mask
    tomesd.apply_patch(vit.model, r=15, within_blocks=True)
    group = vit.model.vit._tomesd_patch
    before = vit.output()
    vit.inputs["pixel_values"][:, :, 20:] += 0.01  # The last row of patches is hidden.
    torch.testing.assert_close(vit.output(), before, atol=1e-2, rtol=1e-2)
    sizes = group.forward.maps[0].size
    assert sizes.sum(1).flatten().tolist() == [20, 20]


@torch.no_grad()
def test_the_report_and_the_trace_say_what_merges_within_each_block():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=[7, 0, 40], within_blocks=True)
    before = tomesd.report(vit.model)
    with tomesd.trace(vit.model) as traced:
        vit.output()
    assert tomesd.report(vit.model).rows == before.rows
    rows = before.rows["vit"]
    assert [(row.tokens, row.merged) for row in rows] == [(37, 30), (37, 37), (37, 19)]
    assert rows[0].work == pytest.approx((30 / 37) ** 2)
    assert [groups.where for groups in traced] == ["layer 0", "layer 2"]
    assert [len(groups.group[0].unique()) for groups in traced] == [30, 19]


def test_a_speedup_within_blocks_counts_the_tokens_of_each_block():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, speedup=1.3, within_blocks=True)
    patch = patched_encoder(vit)._tomesd_patch
    (r,) = set(patch.forward.schedule)
    cost, tokens = patch.cost(), patch.own_tokens
    full = cost.of([0] * 3, tokens, 1, within_blocks=True)
    assert full / cost.of([r] * 3, tokens, 1, within_blocks=True) >= 1.3
    assert full / cost.of([r - 1] * 3, tokens, 1, within_blocks=True) < 1.3


@slow
@pytest.mark.parametrize("name", ["DINOv3", "timm BEiT", "V-JEPA 2", "HuBERT"])
@pytest.mark.parametrize("within_blocks", [False, True])
@torch.no_grad()
def test_models_compile_to_one_graph_within_blocks_and_for_good(name, within_blocks):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=3, within_blocks=within_blocks)
    expected = vit.output()
    vit.model = torch.compile(vit.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(vit.output(), expected, atol=1e-4, rtol=1e-4)


def test_within_blocks_needs_every_token_back():
    with pytest.raises(ValueError, match="unmerge must be True with within_blocks=True"):
        tomesd.apply_patch(build("ViT").model, r=3, within_blocks=True, unmerge=False)


# Blocks on a grid: those of global attention merge, the others have windows.
def _sam(kind: Any, config: Any, attention: str) -> tuple[nn.Module, Any]:
    model = kind(
        config(
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            image_size=24,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[0, 2],
            mlp_dim=48,
            output_channels=8,
            attn_implementation=attention,
        )
    )
    return model, model.vision_encoder.layers


def _vitdet() -> tuple[nn.Module, Any]:
    config = hf.VitDetConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=24,
        patch_size=4,
        window_size=3,
        window_block_indices=[1],
        mlp_ratio=2,
        use_relative_position_embeddings=True,
    )
    model = hf.VitDetModel(config)
    return model, model.encoder.layer


def _timm_sam() -> tuple[nn.Module, Any]:
    model = VisionTransformerSAM(
        img_size=24,
        patch_size=4,
        embed_dim=WIDTH,
        depth=3,
        num_heads=HEADS,
        window_size=3,
        global_attn_indexes=(0, 2),
        use_rel_pos=True,
        neck_chans=8,
    )
    return model, model.blocks


HIERA = {"embed_dim": 6, "mlp_ratio": 2.0}


def _hiera() -> tuple[nn.Module, Any]:
    config = hf.HieraConfig(
        **HIERA, image_size=[96, 96], depths=[1, 1, 4, 2], num_heads=[1, 1, 2, 2]
    )
    model = hf.HieraModel(config)
    return model, model.encoder.stages[2].layers[1:]


def _timm_hiera(fused: bool) -> tuple[nn.Module, Any]:
    model = Hiera(**HIERA, img_size=96, stages=(1, 1, 4, 2), head_mul=1, num_heads=2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model, model.blocks[3:6]


HIERAS = {
    "Hiera": _hiera,
    "timm Hiera": lambda: _timm_hiera(True),
    "timm Hiera, eager": lambda: _timm_hiera(False),
}


@pytest.mark.parametrize("name", HIERAS)
@torch.no_grad()
def test_hiera_merges_where_its_attention_is_global_and_nothing_is_pooled(name):
    model, blocks, call = build_grid(name, size=96)
    plain = call()
    tomesd.apply_patch(model, r=15, within_blocks=True)
    (rows,) = tomesd.report(model).rows.values()
    assert [(row.tokens, row.merged) for row in rows] == [(36, 21)] * 3
    given, taken = inputs_and_outputs(blocks, call)
    assert not torch.equal(call(), plain)
    assert tomesd.report(model).rows.popitem()[1] == rows
    tomesd.remove_patch(model)
    assert torch.equal(call(), plain)
    for block, xs, ys in zip(blocks, given, taken, strict=True):
        for x, y in zip(xs, ys, strict=True):
            want = expected_block(x, describe_grid(block), 15)
            torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)


GRIDS = {
    "SAM": lambda: _sam(hf.SamVisionModel, hf.SamVisionConfig, "sdpa"),
    "SAM, eager": lambda: _sam(hf.SamVisionModel, hf.SamVisionConfig, "eager"),
    "SAM-HQ": lambda: _sam(hf.SamHQVisionModel, hf.SamHQVisionConfig, "sdpa"),
    "ViTDet": _vitdet,
    "timm SAM": _timm_sam,
}
grids = pytest.mark.parametrize("name", GRIDS)


def build_grid(name: str, size: int = 24) -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model, blocks = (GRIDS | HIERAS)[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.eval()
    images = torch.randn(2, 3, size, size)

    def call() -> Tensor:
        out = model(images)
        return out if isinstance(out, Tensor) else out[0]

    return model, blocks, call


def describe_grid(block: Any, width: int = 0) -> Block:
    """A block of global attention on tokens [N, C] of a square grid; Hiera adds no places."""
    attention = getattr(block, "attn", None) or block.attention
    names = (
        ("norm1", "layer_norm1", "layernorm_before"),
        ("norm2", "layer_norm2", "layernorm_after"),
    )
    norms = [next(getattr(block, n) for n in each if hasattr(block, n)) for each in names]

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads(part) for part in attention.qkv(x).chunk(3, dim=-1))

    class OnGrid(Block):
        def logits(self, q: Tensor, k: Tensor, places: list[int]) -> Tensor:
            logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            for i, a in enumerate(places):
                for j, b in enumerate(places):
                    rows = attention.rel_pos_h[a // width - b // width + width - 1]
                    columns = attention.rel_pos_w[a % width - b % width + width - 1]
                    logits[:, i, j] += q[:, i] @ (rows + columns)
            return logits

    kind = OnGrid if width else Block
    return kind(norms[0], qkv, attention.proj, lambda x: block.mlp(norms[1](x)))


@grids
@torch.no_grad()
def test_blocks_of_global_attention_merge_whole_rows_within_them(name):
    model, blocks, call = build_grid(name)
    plain = call()
    tomesd.apply_patch(model, r=15, within_blocks=True)
    given, taken = inputs_and_outputs(blocks, call)
    assert not torch.equal(call(), plain)
    (rows,) = tomesd.report(model).rows.values()
    assert [row.merged for row in rows] == [24, 36, 24]  # 12 of 15: whole rows of 6.
    tomesd.remove_patch(model)
    assert torch.equal(call(), plain)
    for index in (0, 2):
        for x, y in zip(given[index], taken[index], strict=True):
            if name == "ViTDet":
                x, y = x.permute(1, 2, 0), y.permute(1, 2, 0)
            want = expected_block(x.flatten(0, 1), describe_grid(blocks[index], 6), 12)
            torch.testing.assert_close(y.flatten(0, 1), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["SAM", "ViTDet"])
@torch.no_grad()
def test_blocks_on_a_grid_merge_without_proportional_attention(name):
    model, _, call = build_grid(name)
    tomesd.apply_patch(model, r=12, within_blocks=True)
    weighed = call()
    tomesd.apply_patch(model, r=12, within_blocks=True, prop_attn=False)
    assert call().isfinite().all()
    assert not torch.equal(call(), weighed)


@grids
def test_blocks_on_a_grid_are_refused_without_within_blocks(name):
    model, _, _ = build_grid(name)
    with pytest.raises(ValueError, match=r"must be given within_blocks=True and r, since its next"):
        tomesd.apply_patch(model, r=6)


def test_sam_trains_with_merged_tokens():
    model, _, call = build_grid("SAM")
    tomesd.apply_patch(model, r=12, within_blocks=True)
    call().square().mean().backward()
    layers = model.vision_encoder.layers
    for parameter in (layers[0].attn.rel_pos_h, layers[2].attn.qkv.weight):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
