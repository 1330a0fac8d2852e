"""Tiny image, video and audio encoders of transformers, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.support.tiny_vits_base import DEPTH, HEADS, WIDTH, Vit, heads, images
from tests.support.vit_reference import Block


def described(
    model: Any,
    blocks: Any,
    inputs: dict[str, Tensor],
    prefix: int,
    describe: Callable[[Any], Block],
) -> Vit:
    reference = [describe(block) for block in blocks]
    return Vit(model, inputs, list(blocks), reference, prefix)


def qkv(attention: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    projections = (
        (attention.q_proj, attention.k_proj, attention.v_proj)
        if hasattr(attention, "q_proj")
        else (attention.query, attention.key, attention.value)
    )
    return lambda x: tuple(heads(projection(x)) for projection in projections)


def like_vit(block: Any) -> Block:
    return Block(
        block.layernorm_before,
        qkv(block.attention),
        block.attention.o_proj,
        lambda x: block.mlp(block.layernorm_after(x)),
    )


def like_dino(block: Any) -> Block:
    return Block(
        block.norm1,
        qkv(block.attention),
        lambda x: block.layer_scale1(block.attention.o_proj(x)),
        lambda x: block.layer_scale2(block.mlp(block.norm2(x))),
    )


def like_videomae(block: Any) -> Block:
    return Block(
        block.layernorm_before,
        qkv(block.attention.attention),
        block.attention.output.dense,
        lambda x: block.output.dense(block.intermediate(block.layernorm_after(x))),
    )


def configured(config: dict, **family) -> dict:
    defaults = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "image_size": 24,
        "patch_size": 4,
        "num_labels": 5,
        "attn_implementation": "sdpa",
    }
    return defaults | family | config


def _vit(**config) -> Vit:
    model = hf.ViTForImageClassification(hf.ViTConfig(**configured(config)))
    layers = model.vit.layers
    return described(model, layers, {"pixel_values": images()}, 1, like_vit)


def _deit(**config) -> Vit:
    model = hf.DeiTForImageClassification(hf.DeiTConfig(**configured(config)))
    layers = model.deit.layers
    return described(model, layers, {"pixel_values": images()}, 2, like_vit)


def _vit_mae(**config) -> Vit:
    family = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "mask_ratio": 0.25,
    }
    model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**configured(config, **family)))
    inputs = {"pixel_values": images(), "noise": torch.rand(2, 36)}
    return described(model, model.vit.layers, inputs, 1, like_vit)


def _dinov2(**config) -> Vit:
    family = {"mlp_ratio": 2, "layerscale_value": 0.7}
    model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**configured(config, **family)))
    layers = model.dinov2.encoder.layer
    return described(model, layers, {"pixel_values": images()}, 1, like_dino)


def _dinov2_backbone(**config) -> Vit:
    family = {"mlp_ratio": 2, "out_features": ["stage1", "stage3"]}
    model = hf.Dinov2Backbone(hf.Dinov2Config(**configured(config, **family)))
    layers = model.encoder.layer
    return described(model, layers, {"pixel_values": images()}, 1, like_dino)


def _dinov2_with_registers(**config) -> Vit:
    family = {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True}
    kind = hf.Dinov2WithRegistersForImageClassification
    model = kind(hf.Dinov2WithRegistersConfig(**configured(config, **family)))
    encoder = model.dinov2_with_registers
    inputs = {"pixel_values": images()}
    return described(model, encoder.encoder.layer, inputs, 4, like_dino)


def _videomae(**config) -> Vit:
    family = {
        "num_frames": 4,
        "tubelet_size": 2,
        "qkv_bias": True,
        "patch_size": 8,
        "use_mean_pooling": True,
    }
    model = hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**configured(config, **family)))
    layers = model.videomae.encoder.layer
    inputs = {"pixel_values": torch.randn(2, 4, 3, 24, 24)}
    return described(model, layers, inputs, 0, like_videomae)


def _ast(**config) -> Vit:
    family = {"max_length": 24, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}
    model = hf.ASTForAudioClassification(hf.ASTConfig(**configured(config, **family)))
    encoder = model.audio_spectrogram_transformer
    return described(model, encoder.layers, {"input_values": torch.randn(2, 24, 16)}, 2, like_vit)


def _vit_msn(**config) -> Vit:
    model = hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**configured(config)))
    return described(model, model.vit.layers, {"pixel_values": images()}, 1, like_vit)


def _ijepa(**config) -> Vit:
    model = hf.IJepaForImageClassification(hf.IJepaConfig(**configured(config)))
    return described(model, model.ijepa.layers, {"pixel_values": images()}, 0, like_vit)


def _pixio(**config) -> Vit:
    family = {"n_cls_tokens": 3, "mlp_ratio": 2}
    model = hf.PixioModel(hf.PixioConfig(**configured(config, **family)))
    return described(model, model.layers, {"pixel_values": images()}, 3, like_vit)


def _tipsv2_config(config: dict, **family) -> Any:
    family = {"num_register_tokens": 2, "mlp_ratio": 2, "layerscale_value": 0.7} | family
    return hf.Tipsv2VisionConfig(**configured(config, **family))


def _tipsv2(**config) -> Vit:
    model = hf.Tipsv2VisionModel(_tipsv2_config(config))
    return described(model, model.encoder.layer, {"pixel_values": images()}, 3, like_dino)


def _tipsv2_backbone(**config) -> Vit:
    model = hf.Tipsv2VisionBackbone(_tipsv2_config(config, out_features=["stage1", "stage3"]))
    return described(model, model.encoder.layer, {"pixel_values": images()}, 3, like_dino)


def _vivit(**config) -> Vit:
    family = {"num_frames": 4, "tubelet_size": [2, 8, 8]}
    model = hf.VivitForVideoClassification(hf.VivitConfig(**configured(config, **family)))
    inputs = {"pixel_values": torch.randn(2, 4, 3, 24, 24)}
    return described(model, model.vivit.layers, inputs, 1, like_vit)


def _dpt(**config) -> Vit:
    model = hf.DPTModel(hf.DPTConfig(**configured(config, qkv_bias=True)))
    return described(model, model.encoder.layer, {"pixel_values": images()}, 1, like_videomae)


def whisper_config(**config) -> Any:
    family = {
        "d_model": WIDTH,
        "encoder_layers": DEPTH,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_layers": 1,
        "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": 2 * WIDTH,
        "num_mel_bins": 8,
        "max_source_positions": 36,
        "vocab_size": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "attn_implementation": "sdpa",
    }
    return hf.WhisperConfig(**family | config)


def _whisper(**config) -> Vit:
    model = WhisperEncoder(whisper_config(**config))
    inputs = {"input_features": torch.randn(2, 8, 72)}

    def describe(block: Any) -> Block:
        return Block(
            block.self_attn_layer_norm,
            qkv(block.self_attn),
            block.self_attn.out_proj,
            lambda x: block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x)))),
        )

    return described(model, model.layers, inputs, 0, describe)


ENCODERS = {
    "ViT": _vit,
    "DeiT": _deit,
    "ViTMAE": _vit_mae,
    "DINOv2": _dinov2,
    "DINOv2 backbone": _dinov2_backbone,
    "DINOv2 with registers": _dinov2_with_registers,
    "VideoMAE": _videomae,
    "AST": _ast,
    "Whisper": _whisper,
    "ViTMSN": _vit_msn,
    "I-JEPA": _ijepa,
    "Pixio": _pixio,
    "TIPSv2": _tipsv2,
    "TIPSv2 backbone": _tipsv2_backbone,
    "ViViT": _vivit,
    "DPT": _dpt,
}
