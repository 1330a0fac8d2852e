"""More transformers for images, most of one stream of text and image tokens."""

import torch

from tests.support.tiny_model import TEXT_TOKENS, WIDTH
from tests.support.tiny_transformers.images import ids
from tests.support.tiny_transformers.model import HEADS, TinyTransformer, latents, text
from tests.support.tiny_transformers.newer_images import masked_prompt


def _krea2(batch, h, w, normal) -> dict:
    """Three layers of the text encoder."""
    places = torch.cat([torch.zeros(TEXT_TOKENS, 3), ids(h, w)])
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, 3, WIDTH),
        "encoder_attention_mask": masked_prompt(batch),
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


def _fibo2(batch, h, w, normal) -> dict:
    """The first sample's text is shorter, and so is what is made of it."""
    own = {"encoder_hidden_states": normal(batch, 2, TEXT_TOKENS, WIDTH)}
    return latents(batch, h, w, normal) | own | {"encoder_attention_mask": masked_prompt(batch)}


SINGLE_STREAMS = {
    tiny.name: tiny
    for tiny in (
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
            "BriaFibo2Transformer2DModel",
            {
                "in_channels": 4,
                "dim": 24,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "cap_feat_dim": WIDTH,
                "injection_layer_ids": (1,),
                "perceiver_num_layers": 1,
                "min_num_gist_tokens": 4,
                "max_num_gist_tokens": 7,
                "gist_step": 1,
                "gist_min_text_len": 1,
                "gist_max_text_len": 5,
                "axes_dims": (4, 4, 4),
                "axes_lens": (16, 32, 32),
            },
            _fibo2,
            image_first=True,
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
