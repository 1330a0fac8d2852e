"""Diffusers' transformers for videos, tiny, and how each is called; sizes are token grids."""

import torch

from tests.support.tiny_model import TEXT_TOKENS, WIDTH
from tests.support.tiny_transformers.model import (
    HEADS,
    HUNYUAN,
    SQUARE,
    TinyTransformer,
    masked_text,
    text,
    video,
)


def _latte(batch, h, w, normal) -> dict:
    return video(batch, 2, h, w, normal)


def _wan(batch, h, w, normal) -> dict:
    return video(batch, 3, h, w, normal)


def _ltx(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 2 * h * w, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "num_frames": 2,
        "height": h,
        "width": w,
    } | text(batch, normal)


def _cogvideox(batch, h, w, normal) -> dict:
    angles = torch.arange(2 * h * w)[:, None] * torch.arange(1, 9) * 0.05
    return {
        "hidden_states": normal(batch, 2, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    } | text(batch, normal)


def _mochi(batch, h, w, normal) -> dict:
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)
    mask[0, 3:] = False
    return video(batch, 2, h, w, normal) | {"encoder_attention_mask": mask}


def _allegro(batch, h, w, normal) -> dict:
    # Angles of frames, rows and columns, and the places of the tokens on each axis.
    axes = [axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (2, h, w)), indexing="ij")]
    angles = torch.arange(max(2, h, w))[:, None] * torch.arange(1, 5) * 0.05
    angles = angles.to(normal(1).dtype)
    table = [(angles.cos(), angles.sin())] * 3
    places = tuple(axis[None] for axis in axes)
    return video(batch, 2, h, w, normal) | {"image_rotary_emb": (tuple(table), places)}


def _skyreels(batch, h, w, normal) -> dict:
    return _wan(batch, h, w, normal) | {
        "timestep": torch.tensor([[400.0, 450.0, 500.0]]).expand(batch, -1),
        "enable_diffusion_forcing": True,
    }


def _vace(batch, h, w, normal) -> dict:
    return _wan(batch, h, w, normal) | {
        "control_hidden_states": normal(batch, 8, 3, 2 * h, 2 * w),
    }


def _hunyuan_video(batch, h, w, normal) -> dict:
    return (
        video(batch, 2, h, w, normal)
        | {
            "pooled_projections": normal(batch, WIDTH),
            "guidance": torch.full((batch,), 6000.0),
        }
        | masked_text(batch, normal)
    )


def _hunyuan_video15(batch, h, w, normal) -> dict:
    second = masked_text(batch, normal)
    more = {
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "encoder_hidden_states_2": second["encoder_hidden_states"],
        "encoder_attention_mask_2": second["encoder_attention_mask"],
        "image_embeds": normal(batch, 3, WIDTH),
    }
    return video(batch, 2, h, w, normal) | masked_text(batch, normal) | more


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_COGVIDEOX = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "max_text_seq_length": TEXT_TOKENS,
    "num_layers": 2,
    "use_rotary_positional_embeddings": True,
}
VIDEOS = {
    tiny.name: tiny
    for tiny in (
        TinyTransformer(
            "LatteTransformer3DModel",
            SQUARE
            | HEADS
            | {"num_layers": 1, "cross_attention_dim": 16, "caption_channels": WIDTH}
            | {"video_length": 2, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
            _latte,
        ),
        TinyTransformer(
            "AllegroTransformer3DModel",
            HEADS
            | {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
            | {"cross_attention_dim": 24, "caption_channels": WIDTH}
            | {"sample_height": 16, "sample_width": 16, "sample_frames": 2},
            _allegro,
            frames=2,
        ),
        TinyTransformer("WanTransformer3DModel", _WAN, _wan, frames=3),
        TinyTransformer("ChronoEditTransformer3DModel", _WAN, _wan, frames=3),
        TinyTransformer(
            "WanVACETransformer3DModel",
            _WAN | {"vace_layers": [0, 1], "vace_in_channels": 8},
            _vace,
            frames=3,
            # Self- and cross-attention of the blocks that make hints.
            untouched=4,
        ),
        TinyTransformer("SkyReelsV2Transformer3DModel", _WAN, _skyreels, frames=3),
        TinyTransformer(
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
        TinyTransformer(
            "CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox, frames=2, one_map=True
        ),
        TinyTransformer(
            "ConsisIDTransformer3DModel",
            _COGVIDEOX | {"is_train_face": False},
            _cogvideox,
            frames=2,
            one_map=True,
        ),
        TinyTransformer(
            "MochiTransformer3DModel",
            HEADS
            | {"in_channels": 4, "num_layers": 2, "pooled_projection_dim": 16}
            | {"text_embed_dim": WIDTH, "time_embed_dim": 8, "max_sequence_length": TEXT_TOKENS},
            _mochi,
            frames=2,
            image_first=True,
            one_map=True,
        ),
        TinyTransformer(
            "HunyuanVideoTransformer3DModel",
            HUNYUAN
            | {"num_single_layers": 1, "rope_axes_dim": (2, 2, 4)}
            | {"pooled_projection_dim": WIDTH},
            _hunyuan_video,
            frames=2,
            image_first=True,
            one_map=True,
        ),
        TinyTransformer(
            "HunyuanVideo15Transformer3DModel",
            HUNYUAN
            | {"patch_size": 2, "rope_axes_dim": (2, 2, 4)}
            | {"text_embed_2_dim": WIDTH, "image_embed_dim": WIDTH},
            _hunyuan_video15,
            frames=2,
            image_first=True,
            one_map=True,
        ),
    )
}
