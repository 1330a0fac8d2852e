"""Diffusers' own UNets and ControlNets, tiny and with random weights, and how each is called.

Two levels: the finest has transformers, the other has one in the middle. Sizes are latents' (h, w),
which are the tokens of the finest level.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import diffusers
import torch
from torch import Tensor, nn

TEXT = 5
WIDTH = 16
FRAMES = 3


@dataclass
class Tiny:
    """One kind of model. inputs: (batch, h, w, draw), where draw(*shape) gives random numbers.

    sizes: square, oblong, and ones that a cell of 2×2 tokens does not divide at some level.
    """

    name: str
    kind: str
    inputs: Callable[..., dict]
    config: dict = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (6, 10), (7, 9))

    def model(self, **config) -> nn.Module:
        torch.manual_seed(0)
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
        model = getattr(diffusers, self.name)(**defaults | self.config | config).eval()
        for parameter in model.parameters():
            # Gates and last layers start at zero: nothing of what blocks do would be seen.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        return model

    def call(self, model, batch: int = 2, h: int = 6, w: int = 10, **given) -> Tensor:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        inputs = {"timestep": torch.tensor(500)} | self.inputs(batch, h, w, normal)
        # A ControlNet gives what it adds to the levels, and at last to the middle.
        return model(**inputs | given, return_dict=False)[-1]


def _sd(batch, h, w, normal) -> dict:
    return {"sample": normal(batch, 4, h, w), "encoder_hidden_states": normal(batch, TEXT, WIDTH)}


def _controlnet(batch, h, w, normal) -> dict:
    return _sd(batch, h, w, normal) | {"controlnet_cond": normal(batch, 3, 8 * h, 8 * w)}


def _video(batch, h, w, normal) -> dict:
    return {
        "sample": normal(batch, 4, FRAMES, h, w),
        "encoder_hidden_states": normal(batch, TEXT, WIDTH),
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

TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny("UNet2DConditionModel", "2D", _sd, _SD),
        Tiny("ControlNetModel", "2D", _controlnet, _SD),
        Tiny(
            "UNetMotionModel",
            "Motion",
            _animatediff,
            {"num_attention_heads": 2, "motion_num_attention_heads": 2, "norm_num_groups": 8},
        ),
        Tiny(
            "SparseControlNetModel",
            "Motion",
            _sparse,
            {"attention_head_dim": 2, "motion_num_attention_heads": 2, "norm_num_groups": 8}
            | {"conditioning_embedding_out_channels": (8, 8)},
        ),
        Tiny("UNet3DConditionModel", "3D", _video, {"attention_head_dim": 8, "norm_num_groups": 8}),
        Tiny("I2VGenXLUNet", "3D", _i2vgen, {"attention_head_dim": 8, "norm_num_groups": 8}),
        Tiny(
            "UNetSpatioTemporalConditionModel",
            "SpatioTemporal",
            _svd,
            {
                "in_channels": 8,
                "block_out_channels": (32, 32),
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24,
                "num_attention_heads": 2,
            },
            # It has to divide latents by two itself; the tokens in the middle are then 3×5.
            sizes=((8, 8), (6, 10)),
        ),
    )
}
VIDEOS = [name for name in TINY if name not in ("UNet2DConditionModel", "ControlNetModel")]


@contextmanager
def attention_lengths(model: nn.Module) -> Iterator[dict[str, tuple[int, int]]]:
    """How many queries and keys each attention in a model has, by its name: its last call's."""
    seen: dict[str, dict[str, int]] = {}
    lengths: dict[str, tuple[int, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ == "Attention":
            own = seen.setdefault(name, {})
            for part in ("to_q", "to_k"):

                def note(_, args, name=name, own=own, part=part) -> None:
                    own[part] = args[0].shape[1]
                    if len(own) == 2:
                        lengths[name] = own["to_q"], own["to_k"]

                handles.append(getattr(module, part).register_forward_pre_hook(note))
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()


def is_spatial(name: str) -> bool:
    """Whether it is the self-attention of a picture's or a frame's tokens."""
    return ".attentions." in name and ".transformer_blocks." in name and name.endswith(".attn1")
