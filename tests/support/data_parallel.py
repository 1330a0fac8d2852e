"""What each process of test_data_parallel does: its share of a batch, and backward."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import tomesd
from tests.support import tiny_transformers, tiny_unets, tiny_vits

TINY = {
    "UNet": tiny_unets.TINY["UNet2DConditionModel"],
    "transformer": tiny_transformers.TINY[tiny_transformers.PIXART],
}
KINDS = ("ViT", *TINY)
WAYS = ("patched before", "patched after", "with checkpointing")
SETTINGS: dict[str, dict] = {"ViT": {"r": [3, 0, 9]}, "UNet": {}, "transformer": {}}


def build(kind: str) -> Any:
    """A tiny model in training."""
    model = tiny_vits.build("ViT").model if kind == "ViT" else TINY[kind].build()
    return model.double().train()


def _inputs(kind: str, part: slice) -> dict:
    """Of a batch of four."""
    if kind == "ViT":
        draw = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(4, 3, 24, 24, generator=draw).double()[part]}
    inputs = TINY[kind].inputs(batch=4, dtype=torch.float64)
    return {name: value[part] if value.dim() else value for name, value in inputs.items()}


def gradients(kind: str, model: nn.Module, wrapped: nn.Module, accelerator: Accelerator) -> dict:
    """Of the second of two steps that change no weight, on this process's samples."""
    inputs = _inputs(kind, slice(accelerator.process_index, None, accelerator.num_processes))
    for _ in range(2):
        model.zero_grad()
        (output,) = wrapped(**inputs, return_dict=False)
        accelerator.backward(output.square().mean())
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def share(kind: str, way: str, accelerator: Accelerator) -> tuple[str, dict[str, Tensor]]:
    model = build(kind)
    if way == "with checkpointing":
        # What transformers and diffusers call it.
        name = "gradient_checkpointing_enable" if kind == "ViT" else "enable_gradient_checkpointing"
        getattr(model, name)()
    if way != "patched after":
        tomesd.apply_patch(model, **SETTINGS[kind])
    wrapped = accelerator.prepare(model)
    if way == "patched after":
        tomesd.apply_patch(wrapped, **SETTINGS[kind])
    return type(wrapped).__name__, gradients(kind, model, wrapped, accelerator)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = {(kind, way): share(kind, way, accelerator) for kind in KINDS for way in WAYS}
    torch.save(found, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    accelerator.end_training()
