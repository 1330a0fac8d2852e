"""Denoisers train while they merge in several processes as they do in one."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import tomesd

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("UNet", "transformer")
WAYS = ("patched after", "patched before, with checkpointing")


def _unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )


def _transformer() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=8,
        use_additional_conditions=False,
        norm_num_groups=4,
    )


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = (_unet() if kind == "UNet" else _transformer()).double().train()
    for parameter in model.parameters():
        # Gates and last layers start at zero: nothing of what blocks do would be seen.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: nn.Module, wrapped: nn.Module, part: slice) -> dict[str, Tensor]:
    """Of the second of two steps that change no weight, on a part of the batch."""
    draw = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(shape, generator=draw).double()[part] for shape in ((4, 4, 6, 8), (4, 5, 8))
    )
    for _ in range(2):
        model.zero_grad()
        output = wrapped(
            latents,
            encoder_hidden_states=text,
            timestep=torch.full((len(latents),), 500),
            return_dict=False,
        )
        output[0].square().mean().backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def share(kind: str, way: str, rank: int) -> dict[str, Tensor]:
    model = build(kind)
    if way != "patched after":
        model.enable_gradient_checkpointing()
        tomesd.apply_patch(model)
    wrapped = DistributedDataParallel(model)
    if way == "patched after":
        tomesd.apply_patch(wrapped)
    return gradients(model, wrapped, slice(2 * rank, 2 * rank + 2))


def shares(store: Path, rank: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What one of two processes, with half of the batch, has after backward."""
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(str(store), 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    try:
        return {(kind, way): share(kind, way, rank) for kind in KINDS for way in WAYS}
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """This process is the first of the two."""
    folder = tmp_path_factory.mktemp("shares")
    other = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    own = shares(folder / "store", 0)
    _, errors = other.communicate()
    assert other.returncode == 0, errors
    return [own, torch.load(folder / "1.pt")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(both, kind, way):
    plain, model = build(kind), tomesd.apply_patch(build(kind))
    without = gradients(plain, plain, slice(None))
    expected = gradients(model, model, slice(None))
    for found in both:
        got = found[kind, way]
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, msg=name)
    # And merging made them others than they would have been.
    assert any(not torch.allclose(expected[name], without[name]) for name in expected)


if __name__ == "__main__":
    torch.save(shares(Path(sys.argv[1]) / "store", 1), Path(sys.argv[1]) / "1.pt")
