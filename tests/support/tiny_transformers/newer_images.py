"""More of diffusers' transformers for images, tiny, and how each is called."""

import torch

from tests.support.tiny_model import TEXT_TOKENS, WIDTH
from tests.support.tiny_transformers.model import HEADS, TinyTransformer, latents, text


def masked_prompt(batch: int) -> torch.Tensor:
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
    mask = {"attention_mask": masked_prompt(batch)}
    return latents(batch, h, w, normal) | text(batch, normal) | mask


def _lumina_next(batch, h, w, normal) -> dict:
    rows = torch.arange(h)[:, None, None] * torch.tensor([0.5, 0.1])
    columns = torch.arange(w)[None, :, None] * torch.tensor([0.4, 0.2])
    angles = torch.cat([rows.expand(h, w, 2), columns.expand(h, w, 2)], dim=-1)
    return (
        latents(batch, h, w, normal)
        | text(batch, normal)
        | {
            "encoder_mask": masked_prompt(batch).long(),
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
        "encoder_hidden_states_mask": masked_prompt(batch).long(),
        "shape_list": [[(1, h, w)]] * batch,
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
    )
}
