"""Vision Transformers of every family that can be patched, tiny and with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from tests.support.vit_reference import Block

WIDTH, DEPTH, HEADS = 24, 3, 2


@dataclass
class Vit:
    """A model, an input for it, and what the tests need to know about it.

    blocks, reference: its transformer blocks, and what they compute, for vit_reference. prefix: its
    class, distillation and register tokens.
    """

    model: Any
    inputs: dict[str, Tensor]
    blocks: list[nn.Module]
    reference: list[Block]
    prefix: int

    def output(self) -> Tensor:
        out = self.model(**self.inputs)
        out = out if isinstance(out, Tensor) else out[0]
        return torch.stack(out) if isinstance(out, tuple) else out  # A backbone's feature maps.


def build(name: str, seed: int = 0, **config) -> Vit:
    torch.manual_seed(seed)
    vit = FAMILIES[name](**config)
    # Random weights of the usual scale leave every token close to its neighbours and every branch
    # close to nothing: any mistake would be too small to see.
    for parameter in vit.model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    vit.model.eval()
    return vit


def enable_checkpointing(name: str, vit: Vit) -> None:
    """The host's own gradient checkpointing; PyTorch's around each block if it offers none."""
    if name in TRANSFORMERS:
        vit.model.gradient_checkpointing_enable({"use_reentrant": False})
    elif name in TIMM:
        vit.model.set_grad_checkpointing()
    else:
        for block in vit.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _images(size: int = 24) -> Tensor:
    return torch.randn(2, 3, size, size)


def _heads(x: Tensor) -> Tensor:
    """[N, C] as [heads, N, C / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)


def _timm(**config) -> Vit:
    defaults = {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": 5,
    }
    kind = config.pop("kind", VisionTransformer)
    model = kind(**defaults | config)

    def describe(block: Any) -> Block:
        def qkv(x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (_heads(part) for part in block.attn.qkv(x).chunk(3, dim=-1))
            return block.attn.q_norm(q), block.attn.k_norm(k), v

        if isinstance(block, ResPostBlock):
            return Block(
                nn.Identity(),
                qkv,
                lambda x: block.norm1(block.attn.proj(x)),
                lambda x: block.norm2(block.mlp(x)),
            )
        return Block(
            block.norm1,
            qkv,
            lambda x: block.ls1(block.attn.proj(x)),
            lambda x: block.ls2(block.mlp(block.norm2(x))),
        )

    reference = [describe(block) for block in model.blocks]
    return Vit(model, {"x": _images()}, list(model.blocks), reference, model.num_prefix_tokens)


def _torchvision() -> Vit:
    model = TorchvisionViT(24, 4, DEPTH, HEADS, WIDTH, 2 * WIDTH, num_classes=5)

    def describe(block: Any) -> Block:
        attention = block.self_attention

        def qkv(x: Tensor) -> tuple[Tensor, ...]:
            joint = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = (_heads(part) for part in joint.chunk(3, dim=-1))
            return q, k, v

        return Block(block.ln_1, qkv, attention.out_proj, lambda x: block.mlp(block.ln_2(x)))

    blocks = list(model.encoder.layers)
    return Vit(model, {"x": _images()}, blocks, [describe(block) for block in blocks], prefix=1)


def _hf(
    model: Any,
    blocks: Any,
    inputs: dict[str, Tensor],
    prefix: int,
    describe: Callable[[Any], Block],
) -> Vit:
    reference = [describe(block) for block in blocks]
    return Vit(model, inputs, list(blocks), reference, prefix)


def _qkv(attention: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    projections = (
        (attention.q_proj, attention.k_proj, attention.v_proj)
        if hasattr(attention, "q_proj")
        else (attention.query, attention.key, attention.value)
    )
    return lambda x: tuple(_heads(projection(x)) for projection in projections)


def _like_vit(block: Any) -> Block:
    return Block(
        block.layernorm_before,
        _qkv(block.attention),
        block.attention.o_proj,
        lambda x: block.mlp(block.layernorm_after(x)),
    )


def _like_dino(block: Any) -> Block:
    return Block(
        block.norm1,
        _qkv(block.attention),
        lambda x: block.layer_scale1(block.attention.o_proj(x)),
        lambda x: block.layer_scale2(block.mlp(block.norm2(x))),
    )


def _like_clip(block: Any) -> Block:
    return Block(
        block.layer_norm1,
        _qkv(block.self_attn),
        block.self_attn.out_proj,
        lambda x: block.mlp(block.layer_norm2(x)),
    )


def _like_videomae(block: Any) -> Block:
    return Block(
        block.layernorm_before,
        _qkv(block.attention.attention),
        block.attention.output.dense,
        lambda x: block.output.dense(block.intermediate(block.layernorm_after(x))),
    )


def _config(config: dict, **family) -> dict:
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
    model = hf.ViTForImageClassification(hf.ViTConfig(**_config(config)))
    layers = model.vit.layers
    return _hf(model, layers, {"pixel_values": _images()}, 1, _like_vit)


def _deit(**config) -> Vit:
    model = hf.DeiTForImageClassification(hf.DeiTConfig(**_config(config)))
    layers = model.deit.layers
    return _hf(model, layers, {"pixel_values": _images()}, 2, _like_vit)


def _vit_mae(**config) -> Vit:
    family = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "mask_ratio": 0.25,
    }
    model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**_config(config, **family)))
    inputs = {"pixel_values": _images(), "noise": torch.rand(2, 36)}
    return _hf(model, model.vit.layers, inputs, 1, _like_vit)


def _dinov2(**config) -> Vit:
    family = {"mlp_ratio": 2, "layerscale_value": 0.7}
    model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**_config(config, **family)))
    layers = model.dinov2.encoder.layer
    return _hf(model, layers, {"pixel_values": _images()}, 1, _like_dino)


def _dinov2_backbone(**config) -> Vit:
    family = {"mlp_ratio": 2, "out_features": ["stage1", "stage3"]}
    model = hf.Dinov2Backbone(hf.Dinov2Config(**_config(config, **family)))
    layers = model.encoder.layer
    return _hf(model, layers, {"pixel_values": _images()}, 1, _like_dino)


def _dinov2_with_registers(**config) -> Vit:
    family = {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True}
    kind = hf.Dinov2WithRegistersForImageClassification
    model = kind(hf.Dinov2WithRegistersConfig(**_config(config, **family)))
    encoder = model.dinov2_with_registers
    inputs = {"pixel_values": _images()}
    return _hf(model, encoder.encoder.layer, inputs, 4, _like_dino)


def _clip(**config) -> Vit:
    model = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_config(config)))
    encoder = model.vision_model
    inputs = {"pixel_values": _images()}
    return _hf(model, encoder.encoder.layers, inputs, 1, _like_clip)


def _siglip(**config) -> Vit:
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**_config(config)))
    return _hf(model, model.encoder.layers, {"pixel_values": _images()}, 0, _like_clip)


def _videomae(**config) -> Vit:
    family = {
        "num_frames": 4,
        "tubelet_size": 2,
        "qkv_bias": True,
        "patch_size": 8,
        "use_mean_pooling": True,
    }
    model = hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**_config(config, **family)))
    layers = model.videomae.encoder.layer
    inputs = {"pixel_values": torch.randn(2, 4, 3, 24, 24)}
    return _hf(model, layers, inputs, 0, _like_videomae)


def _ast(**config) -> Vit:
    family = {"max_length": 24, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}
    model = hf.ASTForAudioClassification(hf.ASTConfig(**_config(config, **family)))
    encoder = model.audio_spectrogram_transformer
    return _hf(model, encoder.layers, {"input_values": torch.randn(2, 24, 16)}, 2, _like_vit)


TIMM = {
    "timm": _timm,
    "timm with registers": lambda: _timm(reg_tokens=2, qk_norm=True, init_values=0.5),
    "timm distilled": lambda: _timm(kind=VisionTransformerDistilled),
    "timm without class token": lambda: _timm(class_token=False, global_pool="avg"),
    "timm with norms after": lambda: _timm(block_fn=ResPostBlock),
}
TRANSFORMERS = {
    "ViT": _vit,
    "DeiT": _deit,
    "ViTMAE": _vit_mae,
    "DINOv2": _dinov2,
    "DINOv2 backbone": _dinov2_backbone,
    "DINOv2 with registers": _dinov2_with_registers,
    "CLIP": _clip,
    "SigLIP": _siglip,
    "VideoMAE": _videomae,
    "AST": _ast,
}
FAMILIES: dict[str, Callable[..., Vit]] = TIMM | TRANSFORMERS | {"torchvision": _torchvision}
