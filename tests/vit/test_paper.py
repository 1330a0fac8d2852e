"""Logits equal those of the method as the paper describes it, in the paper's order of tokens."""

import pytest
import timm
import torch
from torch import Tensor

import tomesd
from tests.support.slow import slow


def merged(x: Tensor, size: Tensor, keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One sample's tokens [N, C] and sizes [N] after merging r of them by their keys [N, D]."""
    n = len(x)
    if r == 0:  # Nothing is split into sets, and so nothing concatenated.
        return x, size
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[::2] @ keys[1::2].T
    scores[: (prefix + 1) // 2] = -torch.inf
    scores[:, : prefix // 2] = -torch.inf
    best, into = scores.max(-1)
    ranked = best.argsort(descending=True).tolist()
    r = min(r, (n - prefix) // 2)
    total, count = (x * size[:, None])[1::2].clone(), size[1::2].clone()
    for i in ranked[:r]:
        total[into[i]] += x[2 * i] * size[2 * i]
        count[into[i]] += size[2 * i]
    stay = [2 * i for i in sorted(ranked[r:])]
    left, right = x[stay], total / count[:, None]
    if prefix == 2:
        parts = left[:1], right[:1], left[1:], right[1:]
        sizes = size[stay][:1], count[:1], size[stay][1:], count[1:]
        return torch.cat(parts), torch.cat(sizes)
    return torch.cat([left, right]), torch.cat([size[stay], count])


def logits(model: timm.models.VisionTransformer, images: Tensor, schedule: list[int]) -> Tensor:
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    for block, r in zip(model.blocks, schedule, strict=True):
        batch, n, width = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(batch, n, 3, block.attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + size.log()[:, None, None]
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, width)
        x = x + block.attn.proj(attended)
        rows = zip(x, size, k.mean(1), strict=True)
        merges = [merged(*row, r, model.num_prefix_tokens) for row in rows]
        x, size = (torch.stack(parts) for parts in zip(*merges, strict=True))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def decreasing(r: int, layers: int) -> list[int]:
    # Steps are added to the first, as the paper's code does: the last digit of a float decides.
    return [int(2 * r - 2 * r / (layers - 1) * i) for i in range(layers)]


TINY, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
CASES = [
    pytest.param(TINY, 13, marks=()),
    pytest.param(DISTILLED, (8, -1), marks=()),
    *(
        pytest.param(name, r, marks=slow)
        for name in (TINY, DISTILLED, "vit_tiny_patch16_384", "vit_small_patch16_224")
        for r in (8, (13, -1), [40, 0, 7] * 4)
    ),
    pytest.param("vit_small_patch16_384", 23, marks=slow),
    pytest.param("vit_base_patch16_224", (16, -1), marks=slow),
    pytest.param("vit_base_patch16_384", 23, marks=slow),
    pytest.param("deit_base_distilled_patch16_384", [40, 0, 7] * 4, marks=slow),
    pytest.param("vit_large_patch16_224", 8, marks=slow),
    pytest.param("vit_large_patch16_384", (23, -1), marks=slow),
]


@pytest.mark.parametrize(("name", "r"), CASES)
@torch.no_grad()
def test_logits_are_those_of_the_paper_s_method(name, r):
    torch.manual_seed(0)
    # In double precision no rounding decides which of two nearly equal edges merges.
    model = timm.create_model(name, num_classes=10).eval().double()
    small = model.embed_dim < 400
    images = torch.randn(2 if small else 1, 3, *model.patch_embed.img_size).double()
    layers = len(model.blocks)
    schedule = decreasing(r[0], layers) if isinstance(r, tuple) else r
    schedule = [r] * layers if isinstance(schedule, int) else schedule
    expected = logits(model, images, schedule)
    tomesd.apply_patch(model, r=r, order="concatenated")
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    tomesd.apply_patch(model, r=r, order="positions")
    assert (model(images) - expected).abs().max() > 1e-4
