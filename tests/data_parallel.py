"""What each process of tests/test_vit_data_parallel.py does: its share of a batch, and backward."""

import sys
from pathlib import Path

import torch
import transformers as hf
from accelerate import Accelerator
from torch import Tensor, nn

import tomesd

WAYS = ("patched before", "patched after", "with checkpointing")
R = [3, 0, 9]


def build() -> hf.ViTForImageClassification:
    """A tiny model in training, with weights large enough for mistakes to be seen."""
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
    )
    model = hf.ViTForImageClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.train()


def gradients(model: nn.Module, wrapped: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Of the second of two steps that change no weight, on this process's samples."""
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    images = images[accelerator.process_index :: accelerator.num_processes]
    for _ in range(2):
        model.zero_grad()
        accelerator.backward(wrapped(images).logits.square().mean())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def share(accelerator: Accelerator, way: str) -> tuple[str, dict[str, Tensor]]:
    model = build()
    if way == "with checkpointing":
        model.gradient_checkpointing_enable()
    if way != "patched after":
        tomesd.apply_patch(model, r=R)
    wrapped = accelerator.prepare(model)
    if way == "patched after":
        tomesd.apply_patch(wrapped, r=R)
    return type(wrapped).__name__, gradients(model, wrapped, accelerator)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = {way: share(accelerator, way) for way in WAYS}
    torch.save(found, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    accelerator.end_training()
