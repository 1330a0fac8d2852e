"""Tiny vision towers of transformers, with random weights."""

from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

from tests.support.tiny_vits_base import Vit, heads, images
from tests.support.tiny_vits_transformers import configured, described, qkv
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


def _clip(**config) -> Vit:
    model = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**configured(config)))
    encoder = model.vision_model
    inputs = {"pixel_values": images()}
    return described(model, encoder.encoder.layers, inputs, 1, like_clip)


def _siglip(**config) -> Vit:
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**configured(config)))
    return described(model, model.encoder.layers, {"pixel_values": images()}, 0, like_clip)


def _siglip2(**config) -> Vit:
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**configured(config, num_patches=36)))
    inputs = {
        "pixel_values": torch.randn(2, 36, 48),
        "pixel_attention_mask": torch.ones(2, 36),
        "spatial_shapes": torch.full((2, 2), 6),
    }
    return described(model, model.encoder.layers, inputs, 0, like_clip)


def _aimv2(**config) -> Vit:
    model = hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**configured(config, use_head=False)))
    return described(model, model.encoder.layers, {"pixel_values": images()}, 0, _like_aimv2)


def _internvl(**config) -> Vit:
    family = {"use_qk_norm": True, "image_size": [24, 24], "patch_size": [4, 4]}
    kind = hf.InternVLVisionConfig
    model = hf.InternVLVisionModel(kind(**configured(config, **family)))
    return described(model, model.encoder.layer, {"pixel_values": images()}, 1, _like_internvl)


def _tower(kind: Any, prefix: int, inner: str = "", **config) -> Vit:
    """A tower with CLIP's blocks. kind: its class. inner: its part that has the encoder."""
    model = kind(kind.config_class(**configured(config)))
    layers = model.get_submodule(f"{inner}encoder.layers")
    return described(model, layers, {"pixel_values": images()}, prefix, like_clip)


def _git(**config) -> Vit:
    only = {"attn_implementation": "eager"}  # It knows no other.
    return _tower(hf.GitVisionModel, 1, "vision_model.", **config | only)


def _like_blip(block: Any) -> Block:
    def split(x: Any) -> Any:
        return tuple(heads(part) for part in block.self_attn.qkv(x).chunk(3, dim=-1))

    return Block(
        block.layer_norm1,
        split,
        block.self_attn.projection,
        lambda x: block.mlp(block.layer_norm2(x)),
    )


def _blip(kind: Any, **config) -> Vit:
    model = kind(kind.config_class(**configured(config)))
    layers = model.encoder.layers
    return described(model, layers, {"pixel_values": images()}, 1, _like_blip)


def _eager_blip(**config) -> Vit:
    return _blip(hf.BlipVisionModel, **config | {"attn_implementation": "eager"})


TOWERS = {
    "CLIP": _clip,
    "SigLIP": _siglip,
    "SigLIP 2": _siglip2,
    "MetaCLIP 2": partial(_tower, hf.MetaClip2VisionModel, 1),
    "ChineseCLIP": partial(_tower, hf.ChineseCLIPVisionModel, 1),
    "AltCLIP": partial(_tower, hf.AltCLIPVisionModel, 1),
    "CLIPSeg": partial(_tower, hf.CLIPSegVisionModel, 1),
    "OWL-ViT": partial(_tower, hf.OwlViTVisionModel, 1, "vision_model."),
    "OWLv2": partial(_tower, hf.Owlv2VisionModel, 1, "vision_model."),
    "GIT": _git,
    "Kosmos-2": partial(_tower, Kosmos2VisionModel, 1, "model."),
    "Idefics 2": partial(_tower, Idefics2VisionTransformer, 0),
    "Idefics 3": partial(_tower, hf.Idefics3VisionTransformer, 0),
    "SmolVLM": partial(_tower, hf.SmolVLMVisionTransformer, 0),
    "Janus": partial(_tower, hf.JanusVisionModel, 0),
    "AIMv2": _aimv2,
    "InternVL": _internvl,
    "BLIP": _eager_blip,
    "BLIP-2": partial(_blip, hf.Blip2VisionModel),
    "InstructBLIP": partial(_blip, hf.InstructBlipVisionModel),
    "InstructBLIP video": partial(_blip, hf.InstructBlipVideoVisionModel),
}
