"""Blocks of tokens on a grid: SAM, SAM-HQ, ViTDet and Hiera.

Blocks of global attention merge within themselves, since the next block needs the grid; blocks
whose attention is in windows do not merge. Attention adds products of its queries with tables of
relative rows and columns; a merged token has the place of its head.

Hiera has no such tables. Its blocks merge in the first stage of global attention, which has most of
them; the last stage has a quarter of its tokens.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.registry import register
from tomesd.vit.carriers import Carrier
from tomesd.vit.hosts.biased_keys import OneProjection
from tomesd.vit.hosts.placed import Placed, PlacedInput
from tomesd.vit.layer import HookPoints
from tomesd.vit.settings import ViTSettings
from tomesd.vit.spec import Places, ViT


class _OnGrid(Placed):
    layer: "_Grid"

    def unbind(self, dim: int) -> Any:
        """Queries, keys and values, [B · heads, M, D], with the bias of their places."""
        parts = self.carry(self.tensor.unbind(dim))
        q, so_far, attention = parts[0].tensor, self.so_far, self.layer.attention
        q = q.unflatten(0, (so_far.size.shape[0], -1))
        bias: Any = self.bias
        if bias is not None:
            bias = bias.expand(-1, q.shape[1], so_far.m, -1)
        if hasattr(attention, "rel_pos_h"):
            width = self.layer.grid_width()
            row, column = so_far.head // width, so_far.head % width
            placed = _relative(q, attention.rel_pos_h, row, so_far.n // width)
            placed = placed + _relative(q, attention.rel_pos_w, column, width)
            bias = placed if bias is None else placed + bias
        for part in parts:
            part.bias = bias
        return parts

    def total(self, mask: Tensor | None) -> Tensor | None:
        """mask: the host's own bias, of other places: zero, by `__torch_function__`."""
        if self.bias is None or self.tensor.dim() == 4:
            return self.bias
        return self.bias.flatten(0, 1)

    __add__ = Carrier.__add__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return torch.zeros_like(result.tensor) if func is torch.einsum else result


def _relative(q: Tensor, table: Tensor, at: Tensor, size: int) -> Tensor:
    """q · table[at_q − at_k], [B, heads, M, M]; at: int64 [B, M], rows or columns below size."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    offsets = at[:, :, None] - torch.arange(size, device=q.device) + size - 1
    products = torch.einsum("bhmd,bmkd->bhmk", q, table[offsets])
    relative: Tensor = products.gather(3, at[:, None, None].expand(*products.shape[:3], -1))
    return relative


class _Grid(PlacedInput):
    """Blocks of [B, H, W, C]."""

    carrier = _OnGrid

    def attended(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def like(self, x: Tensor, tokens: Tensor) -> Tensor:
        on_grid: Tensor = tokens.unflatten(1, (-1, self.keep(x)))
        return on_grid

    def keep(self, x: Tensor) -> int:
        """Attention takes whole rows."""
        return int(x.shape[2])

    def grid_width(self) -> int:
        """Of the block that the thread is in."""
        return self.keep(self.forwards.thread.inputs[self.index])


class _ChannelsFirst(_Grid):
    """Blocks of [B, C, H, W]."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def like(self, x: Tensor, tokens: Tensor) -> Tensor:
        return super().like(x, tokens).permute(0, 3, 1, 2)

    def keep(self, x: Tensor) -> int:
        return int(x.shape[3])


def _check(model: Any, settings: ViTSettings) -> None:
    if not settings.within_blocks or settings.speedup is not None:
        raise ValueError(
            f"{type(model).__name__} must be given within_blocks=True and r, since its next block "
            f"needs the token grid, got {settings}"
        )


def _is_global(block: Any) -> bool:
    """Whether all tokens of a block see each other, and it has no convolutions."""
    has_rope = getattr(getattr(block, "attn", None), "rope", None) is not None
    return (
        block.window_size == 0 and not getattr(block, "use_residual_block", False) and not has_rope
    )


_SAM = ViT(
    {
        name: Places("layer_norm1", "attn", "layer_norm2", "mlp")
        for name in ("SamVisionLayer", "SamHQVisionLayer")
    },
    prefix=lambda model: 0,
    tokens=lambda model: model.patch_embed.num_patches,
    layer=_Grid,
    check=_check,
    only=_is_global,
)
register(_SAM, "transformers.SamVisionEncoder", "transformers.SamHQVisionEncoder")
register(
    replace(
        _SAM,
        places={"VitDetLayer": Places("norm1", "attention", "norm2", "mlp")},
        tokens=lambda model: model.embeddings.num_patches,
        layer=_ChannelsFirst,
    ),
    "transformers.VitDetModel",
    "transformers.VitDetBackbone",
)
register(
    replace(_SAM, places={"Block": Places("norm1", "attn", "norm2", "mlp")}),
    "timm.VisionTransformerSAM",
)


class _Hiera(OneProjection):
    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.proj.in_features)


def _all_blocks(model: Any) -> list[Any]:
    """Of Hiera, in timm or transformers."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return [block for stage in model.encoder.stages for block in stage.layers]


def _stride(block: Any) -> int:
    """How many tokens become one in a block."""
    return int(getattr(block.attn, "q_stride", 1) * getattr(block.attn, "query_stride", 1))


def _first_global(model: Any) -> nn.ModuleList:
    """The blocks of the first stage of global attention, but for one that pools tokens."""
    blocks = [
        block
        for block in _all_blocks(model)
        if not block.attn.use_mask_unit_attn and _stride(block) == 1
    ]
    width = blocks[0].attn.qkv.in_features
    return nn.ModuleList(block for block in blocks if block.attn.qkv.in_features == width)


def _tokens(model: Any) -> int:
    """What these blocks get."""
    if hasattr(model, "blocks"):
        tokens = math.prod(model.tokens_spatial_shape)
    else:
        tokens = math.prod(model.encoder.schedule[0][1])
    blocks = _all_blocks(model)
    before = blocks[: blocks.index(_first_global(model)[0])]
    return int(tokens // math.prod(map(_stride, before)))


_QKV = 3 * ("attn.qkv",)
_HIERA = ViT(
    {
        "HieraBlock": Places("norm1", "attn", "norm2", "mlp", *_QKV),
        "HieraLayer": Places("layernorm_before", "attn", "layernorm_after", "mlp", *_QKV),
    },
    prefix=lambda model: 0,
    tokens=_tokens,
    blocks=_first_global,
    layer=_Hiera,
    check=_check,
)
register(_HIERA, "timm.Hiera", "transformers.HieraModel")
