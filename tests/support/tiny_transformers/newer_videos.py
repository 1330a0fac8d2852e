"""More of diffusers' transformers for videos, tiny, and how each is called."""

import torch

from tests.support.tiny_model import TEXT_TOKENS, WIDTH
from tests.support.tiny_transformers.model import (
    HEADS,
    TinyTransformer,
    masked_text,
    text,
    video,
)


def _anyflow(batch, h, w, normal) -> dict:
    """Each frame has its own timestep."""
    return video(batch, 3, h, w, normal) | {
        "hidden_states": normal(batch, 3, 4, 2 * h, 2 * w),
        "timestep": torch.tensor([[400.0, 450.0, 500.0]]).expand(batch, -1),
        "r_timestep": torch.tensor([[300.0, 350.0, 400.0]]).expand(batch, -1),
    }


def _wan_animate(batch, h, w, normal) -> dict:
    return video(batch, 3, h, w, normal) | {
        "hidden_states": normal(batch, 12, 3, 2 * h, 2 * w),
        "pose_hidden_states": normal(batch, 4, 2, 2 * h, 2 * w),
        "face_pixel_values": normal(batch, 3, 8, 16, 16),
    }


def _cosmos(batch, h, w, normal) -> dict:
    """Each frame has its own timestep."""
    times = torch.tensor([0.4, 0.5]).view(1, 1, 2, 1, 1).expand(batch, -1, -1, -1, -1)
    return video(batch, 2, h, w, normal) | {
        # What it computes with has the timestep's precision.
        "timestep": times.to(normal(1).dtype),
        "padding_mask": normal(1, 1, 2 * h, 2 * w),
        "fps": 24,
    }


def _easy_animate(batch, h, w, normal) -> dict:
    return video(batch, 2, h, w, normal)


def _kandinsky(batch, h, w, normal) -> dict:
    return text(batch, normal) | {
        "hidden_states": normal(batch, 2, 2 * h, 2 * w, 4),
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "pooled_projections": normal(batch, WIDTH),
        "visual_rope_pos": tuple(torch.arange(size) for size in (2, h, w)),
    }


def _kandinsky5(batch, h, w, normal) -> dict:
    return _kandinsky(batch, h, w, normal) | {"text_rope_pos": torch.arange(TEXT_TOKENS)}


def _motif(batch, h, w, normal) -> dict:
    return video(batch, 2, h, w, normal) | masked_text(batch, normal)


class _NoTuple(TinyTransformer):
    """Without return_dict, it returns the video itself."""

    def call(self, model, **given) -> torch.Tensor:
        return super().call(_InTuple(model), **given)


class _InTuple:
    def __init__(self, model):
        self.model, self.dtype = model, model.dtype

    def __call__(self, **given) -> tuple[torch.Tensor]:
        return (self.model(**given),)


_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": WIDTH,
    "in_text_dim2": WIDTH,
    "time_dim": 8,
    "model_dim": 16,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (2, 2, 4),
}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
NEWER_VIDEOS = {
    tiny.name: tiny
    for tiny in (
        TinyTransformer("AnyFlowTransformer3DModel", _WAN | {"in_channels": 4}, _anyflow, frames=3),
        TinyTransformer(
            "WanAnimateTransformer3DModel",
            _WAN
            | {
                "in_channels": 12,
                "latent_channels": 4,
                "image_dim": None,
                "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
                "motion_encoder_size": 16,
                "motion_style_dim": 8,
                "motion_dim": 4,
                "motion_encoder_dim": 16,
                "face_encoder_hidden_dim": 16,
                "face_encoder_num_heads": 2,
                "inject_face_latents_blocks": 2,
            },
            _wan_animate,
            frames=3,
        ),
        TinyTransformer(
            "CosmosTransformer3DModel",
            HEADS
            | {
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "text_embed_dim": WIDTH,
                "adaln_lora_dim": 4,
                "max_size": (4, 32, 32),
                "extra_pos_embed_type": None,
            },
            _cosmos,
            frames=2,
            one_map=True,
        ),
        TinyTransformer(
            "EasyAnimateTransformer3DModel",
            HEADS
            | {
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "patch_size": 2,
                "num_layers": 2,
                "mmdit_layers": 1,
                "time_embed_dim": 8,
                "text_embed_dim": WIDTH,
            },
            _easy_animate,
            frames=2,
            one_map=True,
        ),
        _NoTuple(
            "Kandinsky5Transformer3DModel",
            _KANDINSKY,
            _kandinsky5,
            frames=2,
            left_float="time_embeddings.in_layer",
        ),
        TinyTransformer(
            "Kandinsky6Transformer3DModel",
            _KANDINSKY | {"visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
            _kandinsky,
            frames=2,
            one_map=True,
        ),
        TinyTransformer(
            "MotifVideoTransformer3DModel",
            HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "text_embed_dim": WIDTH,
                "rope_axes_dim": (2, 2, 4),
                "enable_text_cross_attention_dual": True,
                "enable_text_cross_attention_single": True,
            },
            _motif,
            frames=2,
            image_first=True,
            one_map=True,
            left_float="time_text_embed.timestep_embedder",
        ),
    )
}
