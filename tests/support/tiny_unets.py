"""Diffusers' own UNets and ControlNets, tiny and with random weights, and how each is called.

sd_unet and sdxl_unet have the levels of the models that they are named after. TINY has one of every
class, with two levels: the finest has transformers, the other has one in the middle. Sizes are
latents' (h, w), which are the tokens of the finest level.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from tests.support.tiny_model import TEXT_TOKENS, WIDTH, TinyModel, randomize_zeros

# Of a prompt of Stable Diffusion.
SD_TEXT_TOKENS = 12
FRAMES = 3


def sd_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Like Stable Diffusion 1: transformers at every level but the coarsest, and in the middle."""
    torch.manual_seed(seed)
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**defaults | config).eval()


def sdxl_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Like SDXL: no attention at the finest level, several blocks in each transformer."""
    torch.manual_seed(seed)
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * WIDTH,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    return UNet2DConditionModel(**defaults | config).eval()


def controlnet(unet: UNet2DConditionModel, seed: int = 1) -> ControlNetModel:
    """A ControlNet for the UNet, with weights of its own, so that it has an effect."""
    torch.manual_seed(seed)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * 4)
    randomize_zeros(model, std=0.1)
    return model.eval()


def unet_inputs(unet, batch: int = 2, h: int = 10, w: int = 14, seed: int = 0) -> dict:
    """What a pipeline hands to a UNet in one step, for latents of h×w."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        # The same numbers in every precision.
        return torch.randn(shape, generator=draw).to(unet.dtype)

    inputs = {
        "sample": normal(batch, unet.config.in_channels, h, w),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(batch, SD_TEXT_TOKENS, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal(batch, WIDTH),
            "time_ids": torch.ones(batch, 6),
        }
    return inputs


@torch.no_grad()
def predict(unet, **kwargs) -> torch.Tensor:
    """The UNet's output for `unet_inputs(unet, **kwargs)`; a timestep may be given too."""
    timestep = kwargs.pop("timestep", torch.tensor(500))
    return unet(**unet_inputs(unet, **kwargs) | {"timestep": timestep}).sample


@dataclass
class TinyUNet(TinyModel):
    """One class of UNets or their ControlNets.

    kind: how its blocks' names end. sizes: square, oblong, and ones that a cell of 2×2 tokens does
    not divide at some level.
    """

    kind: str = "2D"
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (6, 10), (7, 9))

    default_grid: ClassVar[tuple[int, int]] = (6, 10)
    # A ControlNet gives what it adds to the levels, and at last to the middle.
    output: ClassVar[int] = -1

    def build(self, seed: int = 0, **config) -> Any:
        defaults = {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": (f"CrossAttnDownBlock{self.kind}", f"DownBlock{self.kind}"),
            "up_block_types": (f"UpBlock{self.kind}", f"CrossAttnUpBlock{self.kind}"),
            "cross_attention_dim": WIDTH,
        }
        if "ControlNet" in self.name:
            del defaults["sample_size"], defaults["up_block_types"]
        return super().build(seed, **defaults | self.config | config)

    def inputs(self, *args, **kwargs) -> dict:
        return {"timestep": torch.tensor(500)} | super().inputs(*args, **kwargs)


def _sd(batch, h, w, normal) -> dict:
    return {
        "sample": normal(batch, 4, h, w),
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, WIDTH),
    }


def _controlnet(batch, h, w, normal) -> dict:
    return _sd(batch, h, w, normal) | {"controlnet_cond": normal(batch, 3, 8 * h, 8 * w)}


def _video(batch, h, w, normal) -> dict:
    return {
        "sample": normal(batch, 4, FRAMES, h, w),
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, WIDTH),
    }


def _sparse(batch, h, w, normal) -> dict:
    """Its pictures are latents here, and there is one for each frame."""
    inputs = _animatediff(batch, h, w, normal)
    return inputs | {
        "controlnet_cond": normal(*inputs["sample"].shape),
        "conditioning_mask": torch.ones(batch, 1, FRAMES, h, w),
    }


def _animatediff(batch, h, w, normal) -> dict:
    inputs = _video(batch, h, w, normal)
    # The pipeline repeats the prompt for each frame.
    text = inputs["encoder_hidden_states"].repeat_interleave(FRAMES, dim=0)
    return inputs | {"encoder_hidden_states": text}


def _i2vgen(batch, h, w, normal) -> dict:
    return _video(batch, h, w, normal) | {
        "fps": torch.full((batch,), 16),
        "image_latents": normal(batch, 4, FRAMES, h, w),
        "image_embeddings": normal(batch, WIDTH),
    }


def _svd(batch, h, w, normal) -> dict:
    return {
        "sample": normal(batch, FRAMES, 8, h, w),
        "encoder_hidden_states": normal(batch, 1, WIDTH),
        "added_time_ids": torch.ones(batch, 3),
    }


_SD = {"attention_head_dim": 2, "norm_num_groups": 8}
_MOTION = {"motion_num_attention_heads": 2, "norm_num_groups": 8}
_3D = {"attention_head_dim": 8, "norm_num_groups": 8}

TINY = {
    tiny.name: tiny
    for tiny in (
        TinyUNet("UNet2DConditionModel", _SD, _sd),
        TinyUNet("ControlNetModel", _SD, _controlnet),
        TinyUNet(
            "UNetMotionModel", _MOTION | {"num_attention_heads": 2}, _animatediff, kind="Motion"
        ),
        TinyUNet(
            "SparseControlNetModel",
            _MOTION | {"attention_head_dim": 2, "conditioning_embedding_out_channels": (8, 8)},
            _sparse,
            kind="Motion",
        ),
        TinyUNet("UNet3DConditionModel", _3D, _video, kind="3D"),
        TinyUNet("I2VGenXLUNet", _3D, _i2vgen, kind="3D"),
        TinyUNet(
            "UNetSpatioTemporalConditionModel",
            {
                "in_channels": 8,
                "block_out_channels": (32, 32),
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24,
                "num_attention_heads": 2,
            },
            _svd,
            kind="SpatioTemporal",
            # It has to divide latents by two itself; the tokens in the middle are then 3×5.
            sizes=((8, 8), (6, 10)),
        ),
    )
}
VIDEOS = [name for name in TINY if name not in ("UNet2DConditionModel", "ControlNetModel")]
