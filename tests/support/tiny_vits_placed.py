"""Tiny Vision Transformers whose attention knows where its tokens are, with random weights."""

from functools import partial
from typing import Any

import transformers as hf
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import (
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from tests.support.tiny_vits_base import DEPTH, HEADS, WIDTH, Vit, heads, images
from tests.support.tiny_vits_transformers import configured, described, qkv
from tests.support.vit_reference import Block


def _of_places(bias: Any) -> Any:
    """bias: gives that of all places, [1, heads, N, N]."""

    def at(places: list[int]) -> Tensor:
        return bias()[0][:, places][:, :, places]

    return at


def _beit(**config) -> Vit:
    family = {"use_relative_position_bias": True, "layer_scale_init_value": 0.7}
    model = hf.BeitForImageClassification(hf.BeitConfig(**configured(config, **family)))
    shared = model.beit.shared_position_bias

    def describe(block: Any) -> Block:
        own = block.relative_position_bias
        biases = [bias for bias in (own, shared) if bias is not None]
        return Block(
            block.layernorm_before,
            qkv(block.attention),
            lambda x: block.lambda_1 * block.attention.o_proj(x),
            lambda x: block.lambda_2 * block.mlp(block.layernorm_after(x)),
            bias=_of_places(lambda: sum(bias((6, 6), False, 37) for bias in biases)),
        )

    layers = model.beit.layers
    return described(model, layers, {"pixel_values": images()}, 1, describe)


def _beit_without_bias(**config) -> Vit:
    family = {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}
    vit = _beit(**family | config)
    vit.reference = [block._replace(bias=None) for block in vit.reference]
    return vit


def _data2vec(**config) -> Vit:
    family = {
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": True,
        "layer_scale_init_value": 0.7,
    }
    kind = hf.Data2VecVisionForImageClassification
    model = kind(hf.Data2VecVisionConfig(**configured(config, **family)))
    encoder = model.data2vec_vision.encoder

    def describe(block: Any) -> Block:
        biases = block.attention.attention.relative_position_bias, encoder.relative_position_bias
        return Block(
            block.layernorm_before,
            qkv(block.attention.attention),
            lambda x: block.lambda_1 * block.attention.output.dense(x),
            lambda x: (
                block.lambda_2 * block.output.dense(block.intermediate(block.layernorm_after(x)))
            ),
            bias=_of_places(lambda: sum(bias((6, 6), False, 37) for bias in biases)),
        )

    return described(model, encoder.layer, {"pixel_values": images()}, 1, describe)


PLACED = {
    "BEiT": _beit,
    "BEiT with a shared bias": partial(_beit, use_shared_relative_position_bias=True),
    "BEiT without a bias": _beit_without_bias,
    "Data2Vec": _data2vec,
}


def _timm(kind: Any, **config) -> Vit:
    defaults = {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": 5,
        "init_values": 0.7,
    }
    model = kind(**defaults | config)
    is_beit = kind is Beit

    def describe(block: Any) -> Block:
        attention = block.attn

        def split(x: Tensor) -> tuple[Tensor, ...]:
            parts = attention.qkv(x).chunk(3, dim=-1)
            if is_beit:
                biases = attention.q_bias, attention.k_bias, attention.v_bias
                parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
                return tuple(map(heads, parts))
            q, k, v = map(heads, parts)
            return attention.q_norm(q), attention.k_norm(k), v

        def bias() -> Tensor:
            if is_beit:
                return attention._get_rel_pos_bias()
            return (attention.rel_pos or model.shared_rel_pos).get_bias()

        if isinstance(block, ResPostRelPosBlock):
            branches = (
                nn.Identity(),
                split,
                lambda x: block.norm1(attention.proj(x)),
                lambda x: block.norm2(block.mlp(x)),
            )
        else:
            scales = (
                (lambda x: block.gamma_1 * x, lambda x: block.gamma_2 * x)
                if is_beit
                else (block.ls1, block.ls2)
            )
            branches = (
                block.norm1,
                split,
                lambda x: scales[0](attention.proj(x)),
                lambda x: scales[1](block.mlp(block.norm2(x))),
            )
        return Block(*branches, bias=_of_places(bias))

    reference = [describe(block) for block in model.blocks]
    return Vit(model, {"x": images()}, list(model.blocks), reference, model.num_prefix_tokens)


TIMM_PLACED = {
    "timm BEiT": partial(_timm, Beit, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "timm relpos": partial(_timm, VisionTransformerRelPos, class_token=True, qk_norm=True),
    "timm relpos with norms after": partial(
        _timm, VisionTransformerRelPos, block_fn=ResPostRelPosBlock, shared_rel_pos=True
    ),
}
