"""What each process of tests/test_data_parallel.py does: its share of a batch, and backward."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as hf
from accelerate import Accelerator
from torch import Tensor, nn

import tomesd

KINDS = ("ViT", "UNet", "transformer")
WAYS = ("patched before", "patched after", "with checkpointing")
SETTINGS: dict[str, dict] = {"ViT": {"r": [3, 0, 9]}, "UNet": {}, "transformer": {}}


def _vit() -> nn.Module:
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
        # Large enough for mistakes to be seen.
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


def _unet() -> nn.Module:
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


def _transformer() -> nn.Module:
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
    """A tiny model in training."""
    torch.manual_seed(0)
    model = {"ViT": _vit, "UNet": _unet, "transformer": _transformer}[kind]().double().train()
    for parameter in model.parameters():
        # Gates and last layers start at zero: nothing of what blocks do would be seen.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def _inputs(kind: str, part: slice) -> dict:
    """Of a batch of four."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=draw).double()[part]

    if kind == "ViT":
        return {"pixel_values": normal(3, 24, 24)}
    latents, text = normal(4, 6, 8), normal(5, 8)
    name = "sample" if kind == "UNet" else "hidden_states"
    timestep = torch.full((len(latents),), 500)
    return {name: latents, "encoder_hidden_states": text, "timestep": timestep}


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
