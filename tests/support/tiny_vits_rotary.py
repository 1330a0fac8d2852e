"""Tiny Vision Transformers with rotary positions, with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from timm.models.eva import Eva
from torch import Tensor

from tests.support.tiny_vits_base import DEPTH, HEADS, WIDTH, Vit, heads, images
from tests.support.tiny_vits_towers import like_clip
from tests.support.tiny_vits_transformers import configured, described, like_dino, qkv
from tests.support.vit_reference import Block

Rotate = Callable[[Tensor, list[int]], Tensor]


def rotating(cos: Tensor, sin: Tensor, prefix: int = 0, halves: bool = True) -> Rotate:
    """Rotates the tokens after the prefix by tables [N, D] or [heads, N, D].

    halves: pairs are a channel of the first half and one of the second; else neighbours.
    """

    def rotate(x: Tensor, places: list[int]) -> Tensor:
        at = [place - prefix for place in places[prefix:]]
        y = x[:, prefix:]
        if halves:
            first, second = y.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        else:
            turned = torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).flatten(-2)
        y = y * cos[..., at, :] + turned * sin[..., at, :]
        return torch.cat([x[:, :prefix], y], dim=1)

    return rotate


def _dinov3(kind: Any = hf.DINOv3ViTModel, **config) -> Vit:
    family = {
        "num_register_tokens": 2,
        "layerscale_value": 0.7,
        "out_features": ["stage1", "stage3"],
    }
    model = kind(hf.DINOv3ViTConfig(**configured(config, **family)))

    def rotate(x: Tensor, places: list[int]) -> Tensor:
        cos, sin = model.rope_embeddings(torch.zeros(1, 3, 24, 24))
        return rotating(cos, sin, 3)(x, places)

    def describe(block: Any) -> Block:
        return like_dino(block)._replace(rotate=rotate)

    return described(model, model.model.layer, {"pixel_values": images()}, 3, describe)


def _mlcd(**config) -> Vit:
    model = hf.MLCDVisionModel(hf.MLCDVisionConfig(**configured(config)))

    def rotate(x: Tensor, places: list[int]) -> Tensor:
        at = torch.tensor([[i // 6, i % 6] for i in range(36)])
        cos, sin = model.vision_rotary_embedding(torch.zeros(1), at)
        own = model.class_pos_emb.repeat(1, 2)
        cos, sin = torch.cat([own.cos(), cos]), torch.cat([own.sin(), sin])
        return rotating(cos, sin)(x, places)

    def describe(block: Any) -> Block:
        return like_clip(block)._replace(rotate=rotate)

    return described(model, model.encoder.layers, {"pixel_values": images()}, 1, describe)


def _pixtral(**config) -> Vit:
    model = hf.PixtralVisionModel(hf.PixtralVisionConfig(**configured(config)))

    @torch.no_grad()
    def describe(block: Any) -> Block:
        at = torch.tensor([[i // 6, i % 6] for i in range(36)])
        cos, sin = model.patch_positional_embedding(torch.zeros(1), at)
        return Block(
            block.attention_norm,
            qkv(block.attention),
            block.attention.o_proj,
            lambda x: block.feed_forward(block.ffn_norm(x)),
            rotating(cos, sin),
        )

    layers = model.transformer.layers
    return described(model, layers, {"pixel_values": images()[:1]}, 0, describe)


def _vjepa2(**config) -> Vit:
    family = {
        "crop_size": 24,
        "frames_per_clip": 4,
        "mlp_ratio": 2,
        "patch_size": 8,
        "pred_hidden_size": WIDTH,
        "pred_num_attention_heads": HEADS,
        "pred_num_hidden_layers": 1,
        "num_pooler_layers": 1,
    }
    model = hf.VJEPA2ForVideoClassification(hf.VJEPA2Config(**configured(config, **family)))

    def rotate(x: Tensor, places: list[int]) -> Tensor:
        """Four channels each for frame, row and column, in a head of twelve."""
        at = torch.tensor([[i // 9, i // 3 % 3, i % 3] for i in places], dtype=x.dtype)
        angles = at[:, :, None] * torch.tensor([1.0, 0.01])
        # Its cosines and sines repeat as halves do, but what they turn are neighbours.
        angles = angles.repeat(1, 1, 2).flatten(1)
        return rotating(angles.cos(), angles.sin(), halves=False)(x, list(range(len(places))))

    def describe(block: Any) -> Block:
        return Block(
            block.norm1,
            qkv(block.attention),
            block.attention.proj,
            lambda x: block.mlp(block.norm2(x)),
            rotate,
        )

    layers = model.vjepa2.encoder.layer
    inputs = {"pixel_values_videos": torch.randn(2, 4, 3, 24, 24)}
    return described(model, layers, inputs, 0, describe)


ROTARY = {
    "DINOv3": _dinov3,
    "DINOv3 backbone": partial(_dinov3, hf.DINOv3ViTBackbone),
    "MLCD": _mlcd,
    "Pixtral": _pixtral,
    "V-JEPA 2": _vjepa2,
}


def eva(**config) -> Vit:
    defaults = {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": 5,
        "mlp_ratio": 2,
        "use_rot_pos_emb": True,
    }
    model = Eva(**defaults | config)
    prefix = model.num_prefix_tokens

    def describe(index: int, block: Any) -> Block:
        attention = block.attn

        def split(x: Tensor) -> tuple[Tensor, ...]:
            if attention.qkv is None:
                parts = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
            else:
                parts = attention.qkv(x).chunk(3, dim=-1)
                if getattr(attention, "q_bias", None) is not None:
                    biases = attention.q_bias, attention.k_bias, attention.v_bias
                    parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
            q, k, v = map(heads, parts)
            return attention.q_norm(q), attention.k_norm(k), v

        def rotate(x: Tensor, places: list[int]) -> Tensor:
            table = model.rope.get_embed((6, 6))
            sin, cos = (table[index] if model.rope_mixed else table).chunk(2, dim=-1)
            return rotating(cos, sin, prefix, halves=attention.rotate_half)(x, places)

        def project(x: Tensor) -> Tensor:
            return attention.proj(attention.norm(x))

        if type(block).__name__ == "EvaBlockPostNorm":
            return Block(
                torch.nn.Identity(),
                split,
                lambda x: block.norm1(project(x)),
                lambda x: block.norm2(block.mlp(x)),
                rotate,
            )
        gammas = [1 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
        return Block(
            block.norm1,
            split,
            lambda x: gammas[0] * project(x),
            lambda x: gammas[1] * block.mlp(block.norm2(x)),
            rotate,
        )

    reference = [describe(index, block) for index, block in enumerate(model.blocks)]
    return Vit(model, {"x": images()}, list(model.blocks), reference, prefix)


EVA = {
    "timm EVA-02": partial(eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
    "timm EVA with norms after": partial(eva, use_post_norm=True, scale_attn_inner=True),
    "timm DINOv3": partial(
        eva, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2, init_values=0.7
    ),
    "timm rope mixed": partial(eva, rope_type="mixed", attn_type="rope", class_token=False),
}
