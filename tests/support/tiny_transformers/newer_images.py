"""More of diffusers' transformers for images, tiny, and how each is called."""

import torch

from tests.support.tiny_model import TEXT_TOKENS, WIDTH
from tests.support.tiny_transformers.images import ids
from tests.support.tiny_transformers.model import HEADS, TinyTransformer, latents, text


def _masked_prompt(batch: int) -> torch.Tensor:
    """The first sample's text has 3 tokens."""
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)
    mask[0, 3:] = False
    return mask


def _glm(batch, h, w, normal) -> dict:
    size = torch.tensor([[16.0 * h, 16.0 * w]]).expand(batch, -1)
    return (
        latents(batch, h, w, normal)
        | text(batch, normal)
        | {
            "prior_token_id": torch.arange(batch * h * w).view(batch, -1) % 8,
            "prior_token_drop": torch.zeros(batch, h * w, dtype=torch.bool),
            "target_size": size,
            "crop_coords": 0 * size,
        }
    )


def _prx(batch, h, w, normal) -> dict:
    mask = {"attention_mask": _masked_prompt(batch)}
    return latents(batch, h, w, normal) | text(batch, normal) | mask


def _lumina_next(batch, h, w, normal) -> dict:
    rows = torch.arange(h)[:, None, None] * torch.tensor([0.5, 0.1])
    columns = torch.arange(w)[None, :, None] * torch.tensor([0.4, 0.2])
    angles = torch.cat([rows.expand(h, w, 2), columns.expand(h, w, 2)], dim=-1)
    return (
        latents(batch, h, w, normal)
        | text(batch, normal)
        | {
            "encoder_mask": _masked_prompt(batch).long(),
            "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
            "cross_attention_kwargs": {},
        }
    )


def _joy(batch, h, w, normal) -> dict:
    own = {"hidden_states": normal(batch, 4, 1, 2 * h, 2 * w)}
    return latents(batch, h, w, normal) | own | text(batch, normal)


def _joy_plus(batch, h, w, normal) -> dict:
    return text(batch, normal) | {
        "hidden_states": normal(batch, h * w, 4, 1, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states_mask": _masked_prompt(batch).long(),
        "shape_list": [[(1, h, w)]] * batch,
    }


def _krea2(batch, h, w, normal) -> dict:
    """Three layers of the text encoder."""
    places = torch.cat([torch.zeros(TEXT_TOKENS, 3), ids(h, w)])
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, 3, WIDTH),
        "encoder_attention_mask": _masked_prompt(batch),
        "position_ids": places,
    }


def _flux3(batch, h, w, normal) -> dict:
    text_ids = torch.zeros(TEXT_TOKENS, 4)
    text_ids[:, 3] = torch.arange(TEXT_TOKENS)
    return text(batch, normal) | {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cat([ids(h, w), torch.zeros(h * w, 1)], dim=1),
        "txt_ids": text_ids,
    }


def _omnigen(batch, h, w, normal) -> dict:
    """The text is causal, and the first sample's padded; the image attends to all of it."""
    n = TEXT_TOKENS + 1 + h * w
    mask = torch.ones(n, n).tril()
    mask[TEXT_TOKENS + 1 :] = 1
    mask = mask.repeat(batch, 1, 1)
    mask[0, :, :2] = 0
    mask[0, :2, :2] = torch.eye(2)
    return latents(batch, h, w, normal) | {
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "input_ids": torch.arange(TEXT_TOKENS).repeat(batch, 1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.to(normal(1).dtype),
        "position_ids": torch.arange(n).repeat(batch, 1),
    }


def _ideogram(batch, h, w, normal) -> dict:
    """The first sample's text has 3 tokens, at the end of its room."""
    n = TEXT_TOKENS + h * w
    role, segment = torch.full((batch, n), 3), torch.ones(batch, n, dtype=torch.long)
    role[:, TEXT_TOKENS:] = 2
    role[0, :2], segment[0, :2] = 0, -1
    places = torch.zeros(batch, n, 3)
    places[:, :TEXT_TOKENS] = torch.arange(TEXT_TOKENS)[:, None]
    places[:, TEXT_TOKENS:] = 64 + ids(h, w)
    return {
        "hidden_states": normal(batch, n, 4),
        # What it computes with has the timestep's precision.
        "timestep": 0.5 + 0 * normal(batch),
        "encoder_hidden_states": normal(batch, n, WIDTH),
        "position_ids": places.long(),
        "segment_ids": segment,
        "indicator": role,
    }


def _ernie(batch, h, w, normal) -> dict:
    return latents(batch, h, w, normal) | {
        "text_bth": normal(batch, TEXT_TOKENS, WIDTH),
        "text_lens": torch.tensor([3] + [TEXT_TOKENS] * (batch - 1)),
    }


def _hidream(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 4, 2 * h, 2 * w),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": normal(batch, TEXT_TOKENS, WIDTH),
        "encoder_hidden_states_llama3": normal(2, batch, TEXT_TOKENS, WIDTH),
        "pooled_embeds": normal(batch, WIDTH),
    }


_JOY = {
    "in_channels": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 2,
    "rope_dim_list": [2, 2, 4],
}
NEWER_IMAGES = {
    tiny.name: tiny
    for tiny in (
        TinyTransformer(
            "GlmImageTransformer2DModel",
            HEADS
            | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": WIDTH}
            | {"time_embed_dim": 8, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 8},
            _glm,
            one_map=True,
        ),
        TinyTransformer(
            "PRXTransformer2DModel",
            {
                "in_channels": 4,
                "context_in_dim": WIDTH,
                "hidden_size": 16,
                "num_heads": 2,
                "depth": 2,
                "axes_dim": [4, 4],
            },
            _prx,
        ),
        TinyTransformer(
            "LuminaNextDiT2DModel",
            {
                "sample_size": 16,
                "hidden_size": 16,
                "num_layers": 2,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "cross_attention_dim": WIDTH,
            },
            _lumina_next,
        ),
        TinyTransformer(
            "JoyImageEditTransformer3DModel", _JOY, _joy, image_first=True, one_map=True
        ),
        TinyTransformer("JoyImageEditPlusTransformer3DModel", _JOY, _joy_plus, image_first=True),
        TinyTransformer(
            "Krea2Transformer2DModel",
            HEADS
            | {
                "in_channels": 4,
                "num_layers": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 16,
                "timestep_embed_dim": 8,
                "text_hidden_dim": WIDTH,
                "num_text_layers": 3,
                "text_num_attention_heads": 2,
                "text_num_key_value_heads": 2,
                "text_intermediate_size": 16,
                "num_layerwise_text_blocks": 1,
                "num_refiner_text_blocks": 1,
                "axes_dims_rope": (2, 2, 4),
            },
            _krea2,
            one_map=True,
        ),
        TinyTransformer(
            "Flux3Transformer2DModel",
            HEADS
            | {
                "in_channels": 4,
                "cond_in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "joint_attention_dim": WIDTH,
                "timestep_channels": 8,
                "axes_dims_rope": (2, 2, 2, 2),
            },
            _flux3,
            one_map=True,
        ),
        TinyTransformer(
            "OmniGenTransformer2DModel",
            {
                "in_channels": 4,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "intermediate_size": 16,
                "num_layers": 2,
                "pad_token_id": 0,
                "vocab_size": 8,
                "max_position_embeddings": 128,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
                "pos_embed_max_size": 24,
                "time_step_dim": 8,
            },
            _omnigen,
            one_map=True,
        ),
        TinyTransformer(
            "Ideogram4Transformer2DModel",
            HEADS
            | {
                "in_channels": 4,
                "num_layers": 2,
                "intermediate_size": 16,
                "adaln_dim": 8,
                "llm_features_dim": WIDTH,
                "rope_theta": 100,
                "mrope_section": (2, 1, 1),
            },
            _ideogram,
        ),
        TinyTransformer(
            "ErnieImageTransformer2DModel",
            {
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_layers": 2,
                "ffn_hidden_size": 16,
                "in_channels": 4,
                "out_channels": 4,
                "patch_size": 2,
                "text_in_dim": WIDTH,
                "rope_axes_dim": (2, 2, 4),
            },
            _ernie,
            image_first=True,
            batch_first=False,
        ),
        TinyTransformer(
            "HiDreamImageTransformer2DModel",
            HEADS
            | {
                "patch_size": 2,
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "caption_channels": [WIDTH, WIDTH],
                "text_emb_dim": WIDTH,
                "num_routed_experts": 0,
                "axes_dims_rope": (4, 2, 2),
                # Pictures that are not square are padded to 44 tokens.
                "max_resolution": (16, 11),
                "llama_layers": [0, 1],
            },
            _hidream,
            image_first=True,
        ),
    )
}
