"""A tiny diffusion transformer, and the inputs and settings that several families share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tomesd
from tests.support.recorders import AttentionRecorder
from tests.support.tiny_model import TEXT_TOKENS, WIDTH, TinyModel


@dataclass
class TinyTransformer(TinyModel):
    """One class of diffusion transformers.

    frames: of its videos, as far as they are tokens of one sample. untouched: how many calls
    of attention are in blocks that do not merge. image_first: whether image tokens come before the
    text's. one_map: whether all samples merge alike. batch_first: whether the tokens of its blocks
    are [batch, tokens, channels]. left_float: a module that the host gives
    float32, whatever its weights are.
    """

    frames: int = 1
    untouched: int = 0
    image_first: bool = False
    one_map: bool = False
    batch_first: bool = True
    left_float: str = ""

    def build(self, seed: int = 0, **config) -> Any:
        model = super().build(seed, **config)
        if self.left_float:
            own = _GivenItsPrecision(model.get_submodule(self.left_float))
            model.set_submodule(self.left_float, own)
        return model

    def attention(self, model, **size) -> list[tuple[int, int]]:
        """Queries and keys of every call of attention."""
        with AttentionRecorder() as attention:
            self.predict(model, **size)
        return attention.seen

    def patched(self, when: str, change: Callable[[Any], object]) -> Any:
        """A model that merges and to which something was done, before or after patching."""
        model = self.build()
        if when == "before":
            change(model)
        tomesd.apply_patch(model)
        if when == "after":
            change(model)
        return model


class _GivenItsPrecision(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.to(next(self.parameters()).dtype))


def latents(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
    }


def text(batch, normal, width: int = WIDTH) -> dict:
    return {"encoder_hidden_states": normal(batch, TEXT_TOKENS, width)}


def masked_text(batch, normal) -> dict:
    mask = torch.ones(batch, TEXT_TOKENS)
    mask[0, 3:] = 0
    return text(batch, normal) | {"encoder_attention_mask": mask}


def video(batch, frames, h, w, normal) -> dict:
    video = {"hidden_states": normal(batch, 4, frames, 2 * h, 2 * w)}
    return latents(batch, h, w, normal) | video | text(batch, normal)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SQUARE = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4}
JOINT = {"joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH}
POOLED = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
HUNYUAN = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
}
