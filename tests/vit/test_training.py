"""Training Vision Transformers of every family with merging on."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tomesd
from tests.support.tiny_vits import Vit, build, enable_checkpointing
from tests.support.vit_reference import encode, unmerge
from tests.vit.test_families import R, families, groups_of_last_run, kinds, run_patched


@families
def test_gradients_are_those_of_the_reference(name):
    vit = build(name)
    first, last = run_patched(vit, r=R)
    weight = vit.blocks[0].get_parameter(next(n for n, p in vit.blocks[0].named_parameters()))
    (got,) = torch.autograd.grad(last.square().sum(), weight, retain_graph=True)
    rows = [
        unmerge(*encode(tokens, vit.reference, R, vit.prefix, suffix=vit.suffix))
        for tokens in first
    ]
    (expected,) = torch.autograd.grad(torch.stack(rows).square().sum(), weight)
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-3)


@kinds
def test_autocast_trains_with_merging(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vit.output().float().square().mean().backward()
    assert len(set(groups_of_last_run(vit)[0])) == len(groups_of_last_run(vit)[0]) - 9
    gradients = [p.grad for p in vit.blocks[0].parameters()]
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.count_nonzero() for g in gradients)


def test_a_callers_own_tensor_goes_through_the_blocks_of_several_forwards():
    vit = build("timm", drop_path_rate=0.5)
    vit.model.train()
    tomesd.apply_patch(vit.model, r=R)
    tokens = torch.randn(8, 37, 24)

    def gradient(call) -> Tensor:
        torch.manual_seed(0)
        loss = 0
        for weight in (1, 2):  # Other paths are dropped each time, so other tokens merge.
            x = tokens
            for block in vit.blocks:
                x = call(block, x)
            loss = loss + weight * x.square().mean()
        return torch.autograd.grad(loss, vit.blocks[0].attn.qkv.weight)[0]

    expected = gradient(lambda block, x: block(x))
    got = gradient(partial(checkpoint, use_reentrant=False))
    torch.testing.assert_close(got, expected)
    assert not vars(tokens)


@kinds
def test_gradient_checkpointing_gives_the_same_gradients(name):
    vit = build(name)
    vit.model.train()
    tomesd.apply_patch(vit.model, r=R)
    torch.manual_seed(0)  # Some hosts move positions or drop paths in training.
    expected = gradients(vit)
    if name.startswith("EoMT"):
        pytest.skip("its host offers no checkpointing")
    enable_checkpointing(name, vit)
    torch.manual_seed(0)
    got = gradients(vit)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=key)


def test_reentrant_checkpointing_gives_the_same_gradients():
    vit = build("ViT")
    vit.model.train()
    tomesd.apply_patch(vit.model, r=R)
    expected = gradients(vit)
    vit.model.gradient_checkpointing_enable({"use_reentrant": True})
    got = gradients(vit)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=key)


@pytest.mark.parametrize("name", ["timm", "ViT", "CLIP", "VideoMAE", "torchvision"])
def test_gradient_checkpointing_goes_back_through_two_forwards(name):
    vit = build(name)
    vit.model.train()
    tomesd.apply_patch(vit.model, r=[5, 5, 2])
    expected = gradients(vit, forwards=2)
    enable_checkpointing(name, vit)
    got = gradients(vit, forwards=2)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=key)


def gradients(vit: Vit, forwards: int = 1) -> dict[str, Tensor]:
    """Of one loss on several inputs."""
    vit.model.zero_grad()
    (name, first), *_ = vit.inputs.items()
    loss = 0
    for i in range(forwards):
        vit.inputs[name] = first.roll(5 * i, dims=-1) * (1 + i)
        loss = loss + vit.output().square().mean()
    vit.inputs[name] = first
    loss.backward()
    return {n: p.grad.clone() for n, p in vit.model.named_parameters() if p.grad is not None}
