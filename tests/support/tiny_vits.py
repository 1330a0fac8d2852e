"""Vision Transformers of every family that can be patched, tiny and with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from tests.support.tiny_vits_base import DEPTH, HEADS, WIDTH, Vit, heads, images
from tests.support.tiny_vits_more import MORE, SPEECH
from tests.support.tiny_vits_placed import PLACED, TIMM_PLACED
from tests.support.tiny_vits_rotary import EVA, ROTARY
from tests.support.tiny_vits_towers import TOWERS
from tests.support.tiny_vits_transformers import ENCODERS
from tests.support.vit_reference import Block

__all__ = ["FAMILIES", "HEADS", "SPEECH", "TIMM", "TRANSFORMERS", "WIDTH", "Vit", "build"]


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
            q, k, v = (heads(part) for part in block.attn.qkv(x).chunk(3, dim=-1))
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
    return Vit(model, {"x": images()}, list(model.blocks), reference, model.num_prefix_tokens)


def _torchvision() -> Vit:
    model = TorchvisionViT(24, 4, DEPTH, HEADS, WIDTH, 2 * WIDTH, num_classes=5)
    return _with_mha(model, model.encoder.layers, "self_attention")


def _open_clip() -> Vit:
    transformer = pytest.importorskip("open_clip.transformer")
    model = transformer.VisionTransformer(24, 4, WIDTH, DEPTH, HEADS, 2.0, 0.7, output_dim=5)
    return _with_mha(model, model.transformer.resblocks, "attn")


def _with_mha(model: Any, blocks: Any, name: str) -> Vit:
    """A model whose attention is PyTorch's MultiheadAttention."""

    def describe(block: Any) -> Block:
        attention = getattr(block, name)
        scales = [getattr(block, scale, nn.Identity()) for scale in ("ls_1", "ls_2")]

        def qkv(x: Tensor) -> tuple[Tensor, ...]:
            joint = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = (heads(part) for part in joint.chunk(3, dim=-1))
            return q, k, v

        return Block(
            block.ln_1,
            qkv,
            lambda x: scales[0](attention.out_proj(x)),
            lambda x: scales[1](block.mlp(block.ln_2(x))),
        )

    reference = [describe(block) for block in blocks]
    return Vit(model, {"x": images()}, list(blocks), reference, prefix=1)


TIMM = {
    "timm": _timm,
    "timm with registers": lambda: _timm(reg_tokens=2, qk_norm=True, init_values=0.5),
    "timm distilled": lambda: _timm(kind=VisionTransformerDistilled),
    "timm without class token": lambda: _timm(class_token=False, global_pool="avg"),
    "timm with norms after": lambda: _timm(block_fn=ResPostBlock),
}
TIMM |= EVA | TIMM_PLACED
TRANSFORMERS = ENCODERS | TOWERS | ROTARY | PLACED | MORE | SPEECH
FAMILIES: dict[str, Callable[..., Vit]] = (
    TIMM | TRANSFORMERS | {"torchvision": _torchvision, "open_clip": _open_clip}
)
