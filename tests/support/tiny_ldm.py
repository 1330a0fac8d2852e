"""The original UNet, tiny and with random weights: CompVis's own, and ComfyUI's stand-in.

CompVis's `ldm` is in PyPI's stable-diffusion-sdkit, whose requirements are too old to be installed
beside the others: `pip install --no-deps stable-diffusion-sdkit==2.1.5`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import stand_in_comfyui as comfyui
from tests.support.tiny_model import WIDTH, randomize_zeros


def compvis(seed: int = 0, **config) -> Any:
    """Stable Diffusion's configuration with two levels."""
    ldm = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    defaults = {
        "image_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [1, 2],
        "channel_mult": [1, 2],
        "num_heads": 4,
        "use_spatial_transformer": True,
        "context_dim": WIDTH,
        "legacy": False,
    }
    torch.manual_seed(seed)
    model = ldm.UNetModel(**defaults | config).eval()
    randomize_zeros(model, std=0.2)
    return model


def stand_in(seed: int = 0) -> Any:
    return comfyui.build(seed=seed).model.diffusion_model


BUILD: dict[str, Callable[..., Any]] = {"CompVis": compvis, "ComfyUI's stand-in": stand_in}


def call(model: nn.Module, batch: int = 2, h: int = 6, w: int = 10, context: Any = ...) -> Tensor:
    """The model's output for latents of h×w."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, h, w, generator=draw)
    text = torch.randn(batch, 5, WIDTH, generator=draw)
    timesteps = torch.full((batch,), 500.0)
    return model(x, timesteps, context=text if context is ... else context)


class LatentDiffusion(nn.Module):
    """The model object of CompVis's scripts and A1111's WebUI: `model.model.diffusion_model`."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = unet
