"""More tiny encoders of transformers: detection, segmentation, poses, speech, and others."""

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.support.tiny_vits_base import DEPTH, HEADS, WIDTH, Vit, images
from tests.support.tiny_vits_rotary import rotating
from tests.support.tiny_vits_towers import like_clip
from tests.support.tiny_vits_transformers import (
    configured,
    described,
    encoder,
    like_dino,
    like_videomae,
    qkv,
)
from tests.support.vit_reference import Block


def _yolos(**config) -> Vit:
    family = {
        "image_size": [24, 24],
        "num_detection_tokens": 5,
        "use_mid_position_embeddings": False,
    }
    model = hf.YolosModel(hf.YolosConfig(**configured(config, **family)))
    layers = model.encoder.layer
    vit = described(model, layers, {"pixel_values": images()}, 1, like_videomae)
    vit.suffix = 5
    return vit


def _like_vitpose(block: Any) -> Block:
    return like_videomae(block)._replace(mlp=lambda x: block.mlp(block.layernorm_after(x)))


def _eomt_config(config: dict) -> dict:
    family = {
        "mlp_ratio": 2,
        "layerscale_value": 0.7,
        "num_blocks": 1,
        "num_queries": 4,
        "num_register_tokens": 2,
        "num_upscale_blocks": 1,
        "num_hidden_layers": DEPTH + 1,
    }
    return configured(config, **family)


def _eomt(**config) -> Vit:
    model = hf.EomtForUniversalSegmentation(hf.EomtConfig(**_eomt_config(config)))

    def describe(block: Any) -> Block:
        return Block(
            block.norm1,
            qkv(block.attention),
            lambda x: block.layer_scale1(block.attention.out_proj(x)),
            lambda x: block.layer_scale2(block.mlp(block.norm2(x))),
        )

    return described(model, model.layers[:DEPTH], {"pixel_values": images()}, 3, describe)


def _eomt_dinov3(**config) -> Vit:
    kind = hf.EomtDinov3ForUniversalSegmentation
    model = kind(hf.EomtDinov3Config(**_eomt_config(config)))

    def rotate(x: Tensor, places: list[int]) -> Tensor:
        cos, sin = model.rope_embeddings(torch.zeros(1, 3, 24, 24))
        return rotating(cos, sin, 3)(x, places)

    def describe(block: Any) -> Block:
        return like_dino(block)._replace(rotate=rotate)

    return described(model, model.layers[:DEPTH], {"pixel_values": images()}, 3, describe)


def _x_clip(**config) -> Vit:
    family = {
        "mit_hidden_size": WIDTH,
        "mit_num_attention_heads": HEADS,
        "mit_num_hidden_layers": 1,
        "num_frames": 1,
    }
    model = hf.XCLIPVisionModel(hf.XCLIPVisionConfig(**configured(config, **family)))

    def describe(block: Any) -> Block:
        def message(x: Tensor) -> Tensor:
            """From the only frame to itself: attention to one token gives its value."""
            token = block.message_fc(x[:1])
            attention = block.message_attn
            return token + attention.out_proj(attention.v_proj(block.message_ln(token)))

        return like_clip(block)._replace(extra=message)

    return described(model, model.encoder.layers, {"pixel_values": images()}, 1, describe)


def _speech(kind: Any, norms_before: bool = False, **config) -> Vit:
    family = {
        "conv_dim": (8, 8),
        "conv_stride": (4, 4),
        "conv_kernel": (4, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "do_stable_layer_norm": norms_before,
        "adapter_attn_dim": 8 if norms_before and kind is hf.Wav2Vec2Model else None,
        "feat_extract_norm": "layer",
        "apply_spec_augment": False,
        "layerdrop": 0.0,
        "vocab_size": 8,
    }
    if kind is hf.SEWModel:
        family |= {"squeeze_factor": 1, "feature_layer_norm_eps": 1e-5}
    model = kind(kind.config_class(**configured(config, **family)))

    def describe(block: Any) -> Block:
        if not norms_before:
            return Block(
                nn.Identity(),
                qkv(block.attention),
                block.attention.out_proj,
                block.feed_forward,
                after=(block.layer_norm, block.final_layer_norm),
            )
        adapter = getattr(block, "adapter_layer", None)
        return Block(
            block.layer_norm,
            qkv(block.attention),
            block.attention.out_proj,
            lambda x: block.feed_forward(block.final_layer_norm(x)),
            after=(nn.Identity(), lambda x: x + adapter(x) if adapter else x),
        )

    layers = model.encoder.layers
    return described(model, layers, {"input_values": torch.randn(2, 600)}, 0, describe)


_flava = encoder(hf.FlavaImageModel, "encoder.layer", 1, like_videomae)

MORE = {
    # It knows no other attention.
    "FLAVA": lambda **config: _flava(**config | {"attn_implementation": "eager"}),
    "YOLOS": _yolos,
    "ViTPose backbone": encoder(
        hf.VitPoseBackbone,
        "encoder.layer",
        0,
        _like_vitpose,
        lambda: {"pixel_values": images(48)},
        image_size=[48, 48],
        patch_size=[8, 8],
        mlp_ratio=2,
        out_features=["stage1", "stage3"],
    ),
    "RADIO": encoder(
        hf.RadioModel,
        "encoder.layer",
        3,
        like_dino,
        max_img_size=24,
        num_cls_tokens=2,
        num_registers=1,
        summary_idxs=[0],
        mlp_ratio=2.0,
        layerscale_value=0.7,
    ),
    "EoMT": _eomt,
    "EoMT DINOv3": _eomt_dinov3,
    "X-CLIP": _x_clip,
}
SPEECH = {
    "wav2vec 2.0": partial(_speech, hf.Wav2Vec2Model),
    "wav2vec 2.0 with norms before": partial(_speech, hf.Wav2Vec2Model, True),
    "HuBERT": partial(_speech, hf.HubertModel),
    "UniSpeech": partial(_speech, hf.UniSpeechModel, True),
    "UniSpeech-SAT": partial(_speech, hf.UniSpeechSatModel),
    "Data2Vec audio": partial(_speech, hf.Data2VecAudioModel),
    "SEW": partial(_speech, hf.SEWModel),
}
