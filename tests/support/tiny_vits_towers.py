"""Tiny vision towers of transformers, with random weights."""

from typing import Any

import torch
import transformers as hf
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

from tests.support.tiny_vits_base import heads
from tests.support.tiny_vits_transformers import encoder, qkv
from tests.support.vit_reference import Block


def like_clip(block: Any) -> Block:
    return Block(
        block.layer_norm1,
        qkv(block.self_attn),
        _output_projection(block.self_attn),
        lambda x: block.mlp(block.layer_norm2(x)),
    )


def _output_projection(attention: Any) -> Any:
    is_janus = hasattr(attention, "projection_layer")
    return attention.projection_layer if is_janus else attention.out_proj


def _like_aimv2(block: Any) -> Block:
    return Block(
        block.rms_norm1,
        qkv(block.attention),
        block.attention.out_proj,
        lambda x: block.ffn(block.rms_norm2(x)),
    )


def _like_internvl(block: Any) -> Block:
    attention = block.attention

    def normed(x: Any) -> Any:
        q, k = attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))
        return tuple(heads(part) for part in (q, k, attention.v_proj(x)))

    return Block(
        block.layernorm_before,
        normed,
        lambda x: block.lambda_1 * attention.projection_layer(x),
        lambda x: block.lambda_2 * block.mlp(block.layernorm_after(x)),
    )


def _like_blip(block: Any) -> Block:
    def split(x: Any) -> Any:
        return tuple(heads(part) for part in block.self_attn.qkv(x).chunk(3, dim=-1))

    return Block(
        block.layer_norm1,
        split,
        block.self_attn.projection,
        lambda x: block.mlp(block.layer_norm2(x)),
    )


def _padded() -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(2, 36, 48),
        "pixel_attention_mask": torch.ones(2, 36),
        "spatial_shapes": torch.full((2, 2), 6),
    }


def _tower(kind: Any, prefix: int, layers: str = "encoder.layers", **family: Any) -> Any:
    """With CLIP's blocks."""
    return encoder(kind, layers, prefix, like_clip, **family)


def _blip(kind: Any) -> Any:
    return encoder(kind, "encoder.layers", 1, _like_blip)


def _eager(build: Any) -> Any:
    """What knows no other attention."""
    return lambda **config: build(**config | {"attn_implementation": "eager"})


_INNER = "vision_model.encoder.layers"

TOWERS = {
    "CLIP": _tower(hf.CLIPVisionModelWithProjection, 1, _INNER),
    "SigLIP": _tower(hf.SiglipVisionModel, 0),
    "SigLIP 2": _tower(hf.Siglip2VisionModel, 0, inputs=_padded, num_patches=36),
    "MetaCLIP 2": _tower(hf.MetaClip2VisionModel, 1),
    "ChineseCLIP": _tower(hf.ChineseCLIPVisionModel, 1),
    "AltCLIP": _tower(hf.AltCLIPVisionModel, 1),
    "CLIPSeg": _tower(hf.CLIPSegVisionModel, 1),
    "OWL-ViT": _tower(hf.OwlViTVisionModel, 1, _INNER),
    "OWLv2": _tower(hf.Owlv2VisionModel, 1, _INNER),
    "GIT": _eager(_tower(hf.GitVisionModel, 1, _INNER)),
    "Kosmos-2": _tower(Kosmos2VisionModel, 1, "model.encoder.layers"),
    "Idefics 2": _tower(Idefics2VisionTransformer, 0),
    "Idefics 3": _tower(hf.Idefics3VisionTransformer, 0),
    "SmolVLM": _tower(hf.SmolVLMVisionTransformer, 0),
    "Janus": _tower(hf.JanusVisionModel, 0),
    "AIMv2": encoder(hf.Aimv2VisionModel, "encoder.layers", 0, _like_aimv2, use_head=False),
    "InternVL": encoder(
        hf.InternVLVisionModel,
        "encoder.layer",
        1,
        _like_internvl,
        use_qk_norm=True,
        image_size=[24, 24],
        patch_size=[4, 4],
    ),
    "BLIP": _eager(_blip(hf.BlipVisionModel)),
    "BLIP-2": _blip(hf.Blip2VisionModel),
    "InstructBLIP": _blip(hf.InstructBlipVisionModel),
    "InstructBLIP video": _blip(hf.InstructBlipVideoVisionModel),
}
