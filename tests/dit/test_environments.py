"""Merging in a transformer of each kind goes together with where and how people run it."""

from functools import partial

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

import tomesd
from tests.support.recorders import count_hooks
from tests.support.threads import replicate, side_by_side
from tests.support.tiny_transformers import KINDS, TINY, TinyTransformer

ORDERS = pytest.mark.parametrize("when", ["before", "after"])


@pytest.fixture(params=KINDS)
def tiny(request) -> TinyTransformer:
    return TINY[request.param]


def _offload_whole(model) -> None:
    accelerate.cpu_offload_with_hook(model, torch.device("cpu"))


def _offload_one_by_one(model) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"))


def _offload_leaves(model) -> None:
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")


def _offload_blocks(model) -> None:
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


@ORDERS
@pytest.mark.parametrize(
    "offload", [_offload_whole, _offload_one_by_one, _offload_leaves, _offload_blocks]
)
def test_offloading_gives_the_same_output_bit_for_bit(tiny, offload, when):
    # From the CPU to the CPU, but through the same hooks of accelerate and of diffusers.
    unpatched = tiny.predict(tiny.build())
    plain = tomesd.apply_patch(tiny.build())
    model = tiny.patched(when, offload)
    assert torch.equal(tiny.predict(model), tiny.predict(plain))
    assert tiny.attention(model) == tiny.attention(plain)
    assert torch.equal(tiny.predict(tomesd.remove_patch(model)), unpatched)


def test_sequential_offloading_still_offloads(tiny):
    model = tiny.patched("after", _offload_one_by_one)
    tiny.predict(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_model_loaded_with_a_device_map_merges(tiny, rest, tmp_path):
    model = tiny.build()
    model.save_pretrained(tmp_path / "model")
    parts = [*dict(model.named_children()), *dict(model.named_parameters(recurse=False))]
    blocks = next(name for name in parts if name.endswith("blocks"))
    loaded = type(model).from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys(parts, "cpu") | {blocks: rest},
        offload_folder=tmp_path / "weights",
    )
    assert any(each.device.type == "meta" for each in loaded.parameters()) == (rest == "disk")
    expected = tiny.predict(tomesd.apply_patch(model))
    assert torch.equal(tiny.predict(tomesd.apply_patch(loaded)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_less_than_half_of_what_merging_does(tiny, dtype):
    model = tiny.build()
    unpatched = tiny.predict(model)
    full = tiny.predict(tomesd.apply_patch(model))
    half = tiny.predict(model.to(dtype))
    assert half.dtype == dtype
    # More than rounding: of pairs that are about as similar, other ones may merge.
    assert (half.float() - full).abs().mean() < 0.5 * (full - unpatched).abs().mean()


def test_it_works_under_autocast(tiny):
    model = tiny.build()
    unpatched = tiny.predict(model)
    full = tiny.predict(tomesd.apply_patch(model))
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny.predict(model).float()
    assert (half - full).abs().mean() < 0.5 * (full - unpatched).abs().mean()


def test_saving_a_patched_model_saves_a_clean_one(tiny, tmp_path):
    model = tiny.build()
    before = tiny.predict(model)
    model.save_pretrained(tmp_path / "clean")
    patched = tomesd.apply_patch(model)
    tiny.predict(patched)
    patched.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        saved, clean = (tmp_path / folder / name for folder in ("patched", "clean"))
        assert saved.read_bytes() == clean.read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert torch.equal(tiny.predict(loaded), before)
    assert count_hooks(loaded) == count_hooks(tiny.build())


def test_threads_may_run_different_sizes_and_batches_of_one_model(tiny):
    model = tomesd.apply_patch(tiny.build(), use_rand=True)
    sizes = [{"batch": 1, "h": 9, "w": 4}, {"batch": 3, "h": 5, "w": 7}]
    expected = [tiny.predict(model, **size) for size in sizes]
    outputs = side_by_side([partial(tiny.predict, model, **size) for size in sizes], times=5)
    for output, want in zip(outputs, expected, strict=True):
        assert all(torch.equal(each, want) for each in output)


@ORDERS
def test_a_data_parallel_model_merges(tiny, when):
    expected = tiny.predict(tomesd.apply_patch(tiny.build()))
    model = tiny.build()
    if when == "before":
        wrapped = tomesd.apply_patch(nn.DataParallel(model))
    else:
        wrapped = nn.DataParallel(tomesd.apply_patch(model))
    with torch.no_grad():
        assert torch.equal(wrapped(**tiny.inputs(), return_dict=False)[0], expected)
    tomesd.remove_patch(wrapped)
    assert count_hooks(model) == count_hooks(tiny.build())


def test_replicas_of_data_parallel_in_their_threads_do_not_mix(tiny):
    """What DataParallel does with several devices: copies that share all hooks, one per thread."""
    model = tomesd.apply_patch(tiny.build())
    replicas = [replicate(model) for _ in range(2)]
    sizes = [{"h": 4, "w": 9}, {"h": 5, "w": 7}]
    expected = [tiny.predict(model, **size) for size in sizes]
    calls = [
        partial(tiny.predict, replica, **size)
        for replica, size in zip(replicas, sizes, strict=True)
    ]
    for output, want in zip(side_by_side(calls, times=5), expected, strict=True):
        assert all(torch.equal(each, want) for each in output)
