"""Diffusers' own diffusion transformers, tiny and with random weights, and how each is called.

Sizes are token grids (h, w), also where a model takes latents or packed tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TEXT = 5
WIDTH = 16


@dataclass
class Tiny:
    """One kind of model.

    name: of its class in diffusers. inputs: (batch, h, w, draw), where draw(*shape) gives random
    numbers of the model's precision. frames: of its videos, as far as they are tokens of one
    sample. alone: how many calls of attention are in blocks that are left alone.
    """

    name: str
    config: dict
    inputs: Callable[..., dict]
    frames: int = 1
    alone: int = 0

    def model(self, seed: int = 0, **config) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(diffusers, self.name)(**self.config | config).eval()
        for parameter in model.parameters():
            # Gates and last layers start at zero: nothing of what blocks do would be seen.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        return model

    def call(self, model, batch: int = 2, h: int = 5, w: int = 7, seed: int = 0, **given) -> Tensor:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(model.dtype)

        return model(**self.inputs(batch, h, w, normal) | given, return_dict=False)[0]


def _latents(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
    }


def _text(batch, normal, width: int = WIDTH) -> dict:
    return {"encoder_hidden_states": normal(batch, TEXT, width)}


def _sd3(batch, h, w, normal) -> dict:
    pooled = {"pooled_projections": normal(batch, WIDTH)}
    return _latents(batch, h, w, normal) | _text(batch, normal) | pooled


def _auraflow(batch, h, w, normal) -> dict:
    return _latents(batch, h, w, normal) | _text(batch, normal)


def ids(h: int, w: int, picture: int = 0) -> Tensor:
    """Flux's image ids: picture, row, column."""
    own = torch.zeros(h, w, 3)
    own[..., 0] = picture
    own[..., 1] += torch.arange(h)[:, None]
    own[..., 2] += torch.arange(w)
    return own.flatten(0, 1)


def _flux(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "pooled_projections": normal(batch, WIDTH),
        "img_ids": ids(h, w),
        "txt_ids": torch.zeros(TEXT, 3),
    } | _text(batch, normal)


def _flux2(batch, h, w, normal) -> dict:
    image = torch.cat([ids(h, w), torch.zeros(h * w, 1)], dim=1)
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": image.expand(batch, -1, -1),
        "txt_ids": text.expand(batch, -1, -1),
    } | _text(batch, normal)


def _qwen(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, h * w, 16),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "img_shapes": [[(1, h, w)]] * batch,
    } | _text(batch, normal)


def _pixart(batch, h, w, normal) -> dict:
    return _latents(batch, h, w, normal) | _text(batch, normal)


def _hunyuan(batch, h, w, normal) -> dict:
    angles = torch.arange(h * w)[:, None] * torch.arange(1, 9) * 0.05
    return _latents(batch, h, w, normal) | {
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "encoder_hidden_states": normal(batch, TEXT, WIDTH),
        "text_embedding_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_t5": normal(batch, TEXT, WIDTH),
        "text_embedding_mask_t5": torch.ones(batch, TEXT),
        "image_meta_size": torch.ones(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _video(batch, frames, h, w, normal) -> dict:
    video = {"hidden_states": normal(batch, 4, frames, 2 * h, 2 * w)}
    return _latents(batch, h, w, normal) | video | _text(batch, normal)


def _latte(batch, h, w, normal) -> dict:
    return _video(batch, 2, h, w, normal)


def _wan(batch, h, w, normal) -> dict:
    return _video(batch, 3, h, w, normal)


def _ltx(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 2 * h * w, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "num_frames": 2,
        "height": h,
        "width": w,
    } | _text(batch, normal)


def _cogvideox(batch, h, w, normal) -> dict:
    angles = torch.arange(2 * h * w)[:, None] * torch.arange(1, 9) * 0.05
    return {
        "hidden_states": normal(batch, 2, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    } | _text(batch, normal)


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_SQUARE = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4}
_JOINT = {"joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH}
_POOLED = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
_PACKED = {"patch_size": 1, "in_channels": 4, "num_layers": 1}
TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "SD3Transformer2DModel",
            _SQUARE
            | _HEADS
            | _JOINT
            | _POOLED
            | {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
            | {"pos_embed_max_size": 24},
            _sd3,
        ),
        Tiny(
            "AuraFlowTransformer2DModel",
            _SQUARE
            | _HEADS
            | _JOINT
            | {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 1024},
            _auraflow,
        ),
        Tiny(
            "FluxTransformer2DModel",
            _PACKED | _HEADS | _POOLED | {"num_single_layers": 1, "axes_dims_rope": (2, 2, 4)},
            _flux,
        ),
        Tiny(
            "Flux2Transformer2DModel",
            _PACKED
            | _HEADS
            | {
                "num_single_layers": 1,
                "joint_attention_dim": WIDTH,
                "timestep_guidance_channels": 8,
                "axes_dims_rope": (2, 2, 2, 2),
            },
            _flux2,
        ),
        Tiny(
            "QwenImageTransformer2DModel",
            _HEADS
            | {
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "joint_attention_dim": WIDTH,
                "axes_dims_rope": (2, 2, 4),
            },
            _qwen,
        ),
        Tiny(
            "PixArtTransformer2DModel",
            _SQUARE
            | _HEADS
            | {
                "out_channels": 8,
                "num_layers": 2,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "use_additional_conditions": False,
                "norm_num_groups": 8,
            },
            _pixart,
        ),
        Tiny(
            "HunyuanDiT2DModel",
            _HEADS
            | {
                "sample_size": 16,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 16,
                "num_layers": 4,
                "cross_attention_dim": WIDTH,
                "cross_attention_dim_t5": WIDTH,
                "pooled_projection_dim": WIDTH,
                "text_len": TEXT,
                "text_len_t5": TEXT,
                "learn_sigma": False,
                "mlp_ratio": 2.0,
            },
            _hunyuan,
            # Self- and cross-attention of the one block with a skip connection.
            alone=2,
        ),
        Tiny(
            "LatteTransformer3DModel",
            _SQUARE
            | _HEADS
            | {"num_layers": 1, "cross_attention_dim": 16, "caption_channels": WIDTH}
            | {"video_length": 2, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
            _latte,
        ),
        Tiny(
            "WanTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": WIDTH,
                "freq_dim": 8,
                "ffn_dim": 32,
                "num_layers": 2,
                "rope_max_seq_len": 32,
            },
            _wan,
            frames=3,
        ),
        Tiny(
            "LTXVideoTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 4,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "num_layers": 2,
            },
            _ltx,
            frames=2,
        ),
        Tiny(
            "CogVideoXTransformer3DModel",
            _HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 8,
                "text_embed_dim": WIDTH,
                "max_text_seq_length": TEXT,
                "num_layers": 2,
                "use_rotary_positional_embeddings": True,
            },
            _cogvideox,
            frames=2,
        ),
    )
}


class Attention(TorchFunctionMode):
    """Notes (queries, keys) of every call of fused attention inside a `with`."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.masks: list[Tensor | None] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            given |= kwargs or {}
            self.seen.append((given["query"].shape[-2], given["key"].shape[-2]))
            self.masks.append(given.get("attn_mask"))
        return function(*args, **(kwargs or {}))
