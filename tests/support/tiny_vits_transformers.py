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


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": images()}


def videos() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 4, 3, 24, 24)}


def encoder(
    kind: Any,
    layers: str,
    prefix: int,
    like: Callable[[Any], Block],
    inputs: Callable[[], dict[str, Tensor]] = pictures,
    **family: Any,
) -> Callable[..., Vit]:
    """Builds a model of a class, whose blocks are in `layers`; family: its own configuration."""

    def build(**config: Any) -> Vit:
        model = kind(kind.config_class(**configured(config, **family)))
        return described(model, model.get_submodule(layers), inputs(), prefix, like)

    return build


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


def _like_whisper(block: Any) -> Block:
    return Block(
        block.self_attn_layer_norm,
        qkv(block.self_attn),
        block.self_attn.out_proj,
        lambda x: block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x)))),
    )


def _whisper(**config) -> Vit:
    model = WhisperEncoder(whisper_config(**config))
    inputs = {"input_features": torch.randn(2, 8, 72)}
    return described(model, model.layers, inputs, 0, _like_whisper)


_STAGES = {"out_features": ["stage1", "stage3"]}
_DINOV2 = {"mlp_ratio": 2, "layerscale_value": 0.7}
_TIPSV2 = {**_DINOV2, "num_register_tokens": 2}
_VIDEO = {"num_frames": 4, "tubelet_size": 2, "patch_size": 8}
_MAE = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "mask_ratio": 0.25,
}
_SOUND = {"max_length": 24, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}

ENCODERS = {
    "ViT": encoder(hf.ViTForImageClassification, "vit.layers", 1, like_vit),
    "DeiT": encoder(hf.DeiTForImageClassification, "deit.layers", 2, like_vit),
    "ViTMAE": encoder(
        hf.ViTMAEForPreTraining,
        "vit.layers",
        1,
        like_vit,
        lambda: pictures() | {"noise": torch.rand(2, 36)},
        **_MAE,
    ),
    "DINOv2": encoder(
        hf.Dinov2ForImageClassification, "dinov2.encoder.layer", 1, like_dino, **_DINOV2
    ),
    "DINOv2 backbone": encoder(
        hf.Dinov2Backbone, "encoder.layer", 1, like_dino, mlp_ratio=2, **_STAGES
    ),
    "DINOv2 with registers": encoder(
        hf.Dinov2WithRegistersForImageClassification,
        "dinov2_with_registers.encoder.layer",
        4,
        like_dino,
        mlp_ratio=2,
        num_register_tokens=3,
        use_swiglu_ffn=True,
    ),
    "VideoMAE": encoder(
        hf.VideoMAEForVideoClassification,
        "videomae.encoder.layer",
        0,
        like_videomae,
        videos,
        **_VIDEO,
        qkv_bias=True,
        use_mean_pooling=True,
    ),
    "AST": encoder(
        hf.ASTForAudioClassification,
        "audio_spectrogram_transformer.layers",
        2,
        like_vit,
        lambda: {"input_values": torch.randn(2, 24, 16)},
        **_SOUND,
    ),
    "Whisper": _whisper,
    "ViTMSN": encoder(hf.ViTMSNForImageClassification, "vit.layers", 1, like_vit),
    "I-JEPA": encoder(hf.IJepaForImageClassification, "ijepa.layers", 0, like_vit),
    "Pixio": encoder(hf.PixioModel, "layers", 3, like_vit, n_cls_tokens=3, mlp_ratio=2),
    "TIPSv2": encoder(hf.Tipsv2VisionModel, "encoder.layer", 3, like_dino, **_TIPSV2),
    "TIPSv2 backbone": encoder(
        hf.Tipsv2VisionBackbone, "encoder.layer", 3, like_dino, **_TIPSV2, **_STAGES
    ),
    "ViViT": encoder(
        hf.VivitForVideoClassification,
        "vivit.layers",
        1,
        like_vit,
        videos,
        num_frames=4,
        tubelet_size=[2, 8, 8],
    ),
    "DPT": encoder(hf.DPTModel, "encoder.layer", 1, like_videomae, qkv_bias=True),
}
