"""Diffusers' transformers for images, tiny, and how each is called; sizes are token grids."""

import torch
from torch import Tensor

from tests.support.tiny_model import TEXT_TOKENS, WIDTH
from tests.support.tiny_transformers.model import (
    HEADS,
    HUNYUAN,
    JOINT,
    POOLED,
    SQUARE,
    TinyTransformer,
    latents,
    masked_text,
    text,
)


def draw_sd3(batch, h, w, normal) -> dict:
    pooled = {"pooled_projections": normal(batch, WIDTH)}
    return latents(batch, h, w, normal) | text(batch, normal) | pooled


def _latents_and_text(batch, h, w, normal) -> dict:
    return latents(batch, h, w, normal) | text(batch, normal)


def ids(h: int, w: int, picture: int = 0) -> Tensor:
    """Flux's image ids: picture, row, column."""
    own = torch.zeros(h, w, 3)
    own[..., 0] = picture
    own[..., 1] += torch.arange(h)[:, None]
    own[..., 2] += torch.arange(w)
    return own.flatten(0, 1)


def draw_flux(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "pooled_projections": normal(batch, WIDTH),
        "img_ids": ids(h, w),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    } | text(batch, normal)


def _flux_variant(batch, h, w, normal) -> dict:
    """Without a pooled text."""
    given = draw_flux(batch, h, w, normal)
    del given["pooled_projections"]
    return given


def _chroma(batch, h, w, normal) -> dict:
    mask = torch.ones(batch, TEXT_TOKENS + h * w)
    mask[0, 3:TEXT_TOKENS] = 0
    return _flux_variant(batch, h, w, normal) | {"attention_mask": mask.to(normal(1).dtype)}


def _flux2(batch, h, w, normal) -> dict:
    image = torch.cat([ids(h, w), torch.zeros(h * w, 1)], dim=1)
    text_ids = torch.zeros(TEXT_TOKENS, 4)
    text_ids[:, 3] = torch.arange(TEXT_TOKENS)
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": image.expand(batch, -1, -1),
        "txt_ids": text_ids.expand(batch, -1, -1),
    } | text(batch, normal)


def draw_qwen(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, h * w, 16),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.long),
        "img_shapes": [[(1, h, w)]] * batch,
    } | text(batch, normal)


def draw_hunyuan(batch, h, w, normal) -> dict:
    angles = torch.arange(h * w)[:, None] * torch.arange(1, 9) * 0.05
    return latents(batch, h, w, normal) | {
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, WIDTH),
        "text_embedding_mask": torch.ones(batch, TEXT_TOKENS),
        "encoder_hidden_states_t5": normal(batch, TEXT_TOKENS, WIDTH),
        "text_embedding_mask_t5": torch.ones(batch, TEXT_TOKENS),
        "image_meta_size": torch.ones(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _cogview(batch, h, w, normal) -> dict:
    size = torch.tensor([[16.0 * h, 16.0 * w]]).expand(batch, -1)
    sizes = {"original_size": size, "target_size": size, "crop_coords": 0 * size}
    return latents(batch, h, w, normal) | text(batch, normal) | sizes


def _hunyuan_image(batch, h, w, normal) -> dict:
    # What it computes with has the timestep's precision.
    timestep = {"timestep": 500 + 0 * normal(batch)}
    return latents(batch, h, w, normal) | masked_text(batch, normal) | timestep


def _lumina(batch, h, w, normal) -> dict:
    mask = {"encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.long)}
    return latents(batch, h, w, normal) | text(batch, normal) | mask


def _zimage(batch, h, w, normal) -> dict:
    """Texts of several lengths, padded to different multiples of 32."""
    return {
        "x": list(normal(batch, 4, 1, 2 * h, 2 * w)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": [normal(65 if index else 33, WIDTH) for index in range(batch)],
    }


PACKED = {"patch_size": 1, "in_channels": 4, "num_layers": 1}
_FLUX = (
    PACKED
    | HEADS
    | {"num_single_layers": 1, "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4)}
)
_COGVIEW = (
    SQUARE
    | HEADS
    | {"num_layers": 2, "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 4}
    | {"pos_embed_max_size": 16}
)
IMAGES = {
    tiny.name: tiny
    for tiny in (
        TinyTransformer(
            "SD3Transformer2DModel",
            SQUARE
            | HEADS
            | JOINT
            | POOLED
            | {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
            | {"pos_embed_max_size": 24},
            draw_sd3,
        ),
        TinyTransformer(
            "AuraFlowTransformer2DModel",
            SQUARE
            | HEADS
            | JOINT
            | {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 1024},
            _latents_and_text,
        ),
        TinyTransformer(
            "FluxTransformer2DModel",
            PACKED | HEADS | POOLED | {"num_single_layers": 1, "axes_dims_rope": (2, 2, 4)},
            draw_flux,
            one_map=True,
        ),
        TinyTransformer(
            "ChromaTransformer2DModel",
            _FLUX
            | {"approximator_num_channels": 16, "approximator_hidden_dim": 16}
            | {"approximator_layers": 1},
            _chroma,
            one_map=True,
        ),
        TinyTransformer(
            "BriaTransformer2DModel",
            _FLUX | {"pooled_projection_dim": WIDTH},
            _flux_variant,
            one_map=True,
        ),
        TinyTransformer("LongCatImageTransformer2DModel", _FLUX, _flux_variant, one_map=True),
        TinyTransformer(
            "OvisImageTransformer2DModel", _FLUX | {"out_channels": 4}, _flux_variant, one_map=True
        ),
        TinyTransformer(
            "Flux2Transformer2DModel",
            PACKED
            | HEADS
            | {
                "num_single_layers": 1,
                "joint_attention_dim": WIDTH,
                "timestep_guidance_channels": 8,
                "axes_dims_rope": (2, 2, 2, 2),
            },
            _flux2,
            one_map=True,
        ),
        TinyTransformer(
            "QwenImageTransformer2DModel",
            HEADS
            | {
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "joint_attention_dim": WIDTH,
                "axes_dims_rope": (2, 2, 4),
            },
            draw_qwen,
            one_map=True,
        ),
        TinyTransformer(
            "PixArtTransformer2DModel",
            SQUARE
            | HEADS
            | {
                "out_channels": 8,
                "num_layers": 2,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "use_additional_conditions": False,
                "norm_num_groups": 8,
            },
            _latents_and_text,
        ),
        TinyTransformer(
            "HunyuanDiT2DModel",
            HEADS
            | {
                "sample_size": 16,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 16,
                "num_layers": 4,
                "cross_attention_dim": WIDTH,
                "cross_attention_dim_t5": WIDTH,
                "pooled_projection_dim": WIDTH,
                "text_len": TEXT_TOKENS,
                "text_len_t5": TEXT_TOKENS,
                "learn_sigma": False,
                "mlp_ratio": 2.0,
            },
            draw_hunyuan,
            one_map=True,
            # Self- and cross-attention of the one block with a skip connection.
            untouched=2,
        ),
        TinyTransformer("CogView3PlusTransformer2DModel", _COGVIEW, _cogview),
        TinyTransformer(
            "CogView4Transformer2DModel",
            {**_COGVIEW, "rope_axes_dim": (16, 16)},
            _cogview,
            one_map=True,
        ),
        TinyTransformer(
            "HunyuanImageTransformer2DModel",
            HUNYUAN | {"num_single_layers": 1, "patch_size": (2, 2), "rope_axes_dim": (4, 4)},
            _hunyuan_image,
            image_first=True,
            one_map=True,
        ),
        TinyTransformer(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 16,
                "in_channels": 4,
                "hidden_size": 24,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "axes_dim_rope": (4, 4, 4),
                "axes_lens": (16, 32, 32),
                "cap_feat_dim": WIDTH,
            },
            _lumina,
        ),
        TinyTransformer(
            "ZImageTransformer2DModel",
            {
                "in_channels": 4,
                "dim": 24,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": WIDTH,
                "axes_dims": (4, 4, 4),
                "axes_lens": (128, 32, 32),
            },
            _zimage,
            image_first=True,
            # Of the block for the text only, which has more tokens than the image here.
            untouched=1,
        ),
    )
}

# It knows square pictures alone, and no text.
DIT = TinyTransformer(
    "DiTTransformer2DModel",
    SQUARE | HEADS | {"out_channels": 4, "num_layers": 2, "norm_num_groups": 8},
    lambda batch, h, w, normal: (
        latents(batch, h, w, normal) | {"class_labels": torch.arange(batch)}
    ),
)
