"""Threads that share a patched Vision Transformer do not mix what they merge."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tomesd
from tests.support.slow import VIT_KINDS, slow
from tests.support.threads import meeting, replicate, side_by_side
from tests.support.tiny_vits import HEADS, WIDTH, Vit, build, enable_checkpointing

kinds = pytest.mark.parametrize("name", sorted(VIT_KINDS))
few = pytest.mark.parametrize("name", ["timm", "ViT", "VideoMAE", "torchvision"])
R = [3, 0, 9]


def together(calls: list[Callable[[], object]], watched: list[nn.Module]) -> list:
    """What each call gives, from threads that enter and leave the watched modules together."""
    return [output for (output,) in side_by_side(calls, meet_in=watched)]


def batches(vit: Vit) -> list[Vit]:
    """The same model with one picture, and with two others."""
    one = {name: value[:1] for name, value in vit.inputs.items()}
    two = {name: value.flip(-1) for name, value in vit.inputs.items()}
    return [Vit(vit.model, inputs, [], [], vit.prefix) for inputs in (one, two)]


@torch.no_grad()
def output(vit: Vit) -> Tensor:
    return vit.output()


def inside(vit: Vit) -> list[nn.Module]:
    """Every module of a block, so that threads are at the same place all the time."""
    return [module for block in vit.blocks for module in block.modules()]


def assert_alike(vits: list[Vit], watched: list[nn.Module]) -> None:
    alone = [output(vit) for vit in vits]
    got = together([lambda vit=vit: output(vit) for vit in vits], watched)
    torch.testing.assert_close(got, alone)


@kinds
def test_threads_with_other_pictures_get_what_each_gets_alone(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=R)
    assert_alike(batches(vit), inside(vit))


@few
def test_threads_do_not_mix_where_another_hook_changes_what_blocks_give(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=R)
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: out * 1.1)
    assert_alike(batches(vit), inside(vit))


def dynamic() -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 24, "patch_size": 4, "embed_dim": WIDTH, "depth": 3, "num_heads": HEADS}
    return VisionTransformer(**size, dynamic_img_size=True).eval()


def test_threads_with_other_sizes_get_what_each_gets_alone():
    model = tomesd.apply_patch(dynamic(), r=R)
    sizes = [torch.randn(1, 3, 32, 20), torch.randn(1, 3, 24, 24)]
    vits = [Vit(model, {"x": x}, list(model.blocks), [], 1) for x in sizes]
    assert_alike(vits, inside(vits[0]))


@torch.no_grad()
def test_hidden_states_of_threads_are_each_its_own():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=R)

    def states(vit: Vit) -> Tensor:
        with torch.no_grad():
            return torch.stack(vit.model(**vit.inputs, output_hidden_states=True).hidden_states)

    alone = [states(each) for each in batches(vit)]
    got = together([lambda each=each: states(each) for each in batches(vit)], inside(vit))
    assert all(torch.equal(*pair) for pair in zip(got, alone, strict=True))


@torch.no_grad()
def test_the_report_is_of_the_latest_picture_whichever_thread_it_was_in():
    model = tomesd.apply_patch(dynamic(), r=5)
    model(torch.randn(1, 3, 24, 24))
    thread = threading.Thread(target=model, args=(torch.randn(1, 3, 32, 20),))
    thread.start()
    thread.join()
    assert [row.merged for row in tomesd.report(model).rows["VisionTransformer"]] == [36, 31, 26]


def test_each_forward_is_traced_with_its_own_tokens():
    model = tomesd.apply_patch(dynamic(), r=R)
    sizes = [torch.randn(1, 3, 32, 20), torch.randn(2, 3, 24, 24)]
    vits = [Vit(model, {"x": x}, list(model.blocks), [], 1) for x in sizes]

    def traced(vits: list[Vit], run) -> dict:
        with tomesd.trace(model) as records:
            run(vits)
        assert [record.where for record in records] == ["layer 0", "layer 1", "layer 2"] * 2
        assert sorted(record.step for record in records) == [0, 0, 0, 1, 1, 1]
        return {(record.grid, record.where): record.group for record in records}

    alone = traced(vits, lambda vits: [output(vit) for vit in vits])
    convolution = model.patch_embed.proj
    watched = [*inside(vits[0]), convolution]
    got = traced(vits, lambda vits: together([lambda v=v: output(v) for v in vits], watched))
    assert alone.keys() == got.keys()
    assert all(torch.equal(got[key], alone[key]) for key in alone)


@slow
@pytest.mark.parametrize("name", ["ViT", "VideoMAE"])
@torch.no_grad()
def test_threads_share_a_compiled_model(name):
    vit = build(name, num_hidden_layers=2)
    tomesd.apply_patch(vit.model, r=6)
    vits = batches(vit)
    alone = [output(each) for each in vits]
    compiled = torch.compile(vit.model, fullgraph=True, backend="eager", dynamic=False)
    for each in vits:
        each.model = compiled
    for _ in range(2):
        got = together([lambda each=each: output(each) for each in vits], [])
        for pair in zip(got, alone, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def weight(vit: Vit) -> Tensor:
    return next(parameter for parameter in vit.blocks[0].parameters() if parameter.dim() > 1)


@few
def test_threads_that_share_a_model_train_with_checkpointing(name):
    vit = build(name)
    vit.model.train()
    tomesd.apply_patch(vit.model, r=R)
    vits = batches(vit)

    def gradient(each: Vit, before_backward: Callable[[], object]) -> Tensor:
        loss = each.output().square().mean()
        before_backward()
        return torch.autograd.grad(loss, weight(vit))[0]

    expected = [gradient(each, lambda: None) for each in vits]
    enable_checkpointing(name, vit)
    barrier = meeting(len(vits))
    got = together([lambda each=each: gradient(each, barrier.wait) for each in vits], [])
    for each, want in zip(got, expected, strict=True):
        torch.testing.assert_close(each, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_run_again_in_a_thread_that_only_goes_backward(reentrant):
    """Autograd's own threads do that for a model on a GPU, the same thread in every step."""
    vit = build("ViT")
    vit.model.train()
    tomesd.apply_patch(vit.model, r=R)
    first, second = batches(vit)

    def train(step: Callable) -> list[Tensor]:
        gradients = []
        for each in (first, second, first):
            vit.model.zero_grad()
            step(each.output().square().mean().backward)
            gradients.append(weight(vit).grad.clone())
        return gradients

    expected = train(lambda backward: backward())
    vit.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with ThreadPoolExecutor(max_workers=1) as pool:
        got = train(lambda backward: pool.submit(backward).result(timeout=60))
    for each, want in zip(got, expected, strict=True):
        torch.testing.assert_close(each, want, rtol=1e-4, atol=1e-6)


# transformers' backbones collect feature maps with hooks that know the one model they are of.
@pytest.mark.parametrize("name", [name for name in sorted(VIT_KINDS) if "backbone" not in name])
@torch.no_grad()
def test_replicas_of_data_parallel_in_their_threads_do_not_mix(name):
    """What DataParallel does with several devices: copies that share all hooks, one per thread."""
    vit = build(name)
    tomesd.apply_patch(vit.model, r=R)
    vits = batches(vit)
    alone = [output(each) for each in vits]
    for each in vits:
        each.model = replicate(vit.model, copy_weights=True)
    for parameter in vit.model.parameters():
        parameter.fill_(torch.nan)  # As if on a device that the replicas cannot reach.
    got = together([lambda each=each: output(each) for each in vits], inside(vit))
    for pair in zip(got, alone, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
