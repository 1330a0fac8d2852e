"""Layers whose attention takes no mask: VideoMAE and DPT of transformers, BLIP and its variants.

The keys carry log(size) to where the logits are computed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.registry import register
from tomesd.vit.hosts.transformers import TRANSFORMERS
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places


def _carrying(method: str) -> Callable[..., "_WeighedKeys"]:
    """A tensor's method whose result carries the bias on."""

    def call(self: "_WeighedKeys", *args: Any, **kwargs: Any) -> Any:
        return _WeighedKeys.carry(getattr(self.tensor, method)(*_plain(args), **kwargs), self.bias)

    return call


def _plain(args: Any) -> Any:
    """The arguments of a call, with tensors in place of the keys that carry a bias."""
    if isinstance(args, tuple | list):
        return tuple(map(_plain, args))
    return args.tensor if isinstance(args, _WeighedKeys) else args


class _WeighedKeys:
    """Keys that carry a bias, [B, 1, 1, N], to the logits of the attention, eager or fused.

    Not a tensor but what torch functions take for one, so that it can hold any kind of tensor. It
    has what the hosts call and nothing else: a method that lost the bias must not go unnoticed.
    """

    def __init__(self, tensor: Tensor, bias: Tensor):
        self.tensor, self.bias = tensor, bias

    view, reshape = _carrying("view"), _carrying("reshape")
    flatten, unflatten = _carrying("flatten"), _carrying("unflatten")
    permute, transpose = _carrying("permute"), _carrying("transpose")
    unbind, contiguous = _carrying("unbind"), _carrying("contiguous")
    __getitem__, __neg__ = _carrying("__getitem__"), _carrying("__neg__")
    __add__, __mul__ = _carrying("__add__"), _carrying("__mul__")

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def size(self) -> torch.Size:
        return self.tensor.shape

    @classmethod
    def carry(cls, result: Any, bias: Tensor) -> Any:
        if isinstance(result, tuple | list):
            return tuple(cls(part, bias) for part in result)
        return cls(result, bias)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = args[0] if isinstance(args[0], tuple | list) else args
        bias = next(part.bias for part in parts if isinstance(part, cls))
        args = _plain(args)
        if func is F.scaled_dot_product_attention:
            return func(*args[:3], **kwargs | {"attn_mask": bias})
        if func is F.softmax:
            return func(args[0] + bias, *args[1:], **kwargs)
        return cls.carry(func(*args, **kwargs), bias)


class BiasedKeys(Layer):
    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)

    def carry_bias(self, key: nn.Module, args: Args, output: Tensor) -> Tensor | _WeighedKeys:
        bias = self.forward.key_bias(self.index, args[0], None)
        return output if bias is None else _WeighedKeys(output, bias[:, None, None])


class _VideoMAE(BiasedKeys):
    """The MLP ends in a module that adds the residual stream itself: the residual is merged, and
    nothing has to be unmerged."""

    def install_merging(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.merge, self.merge)
        patch.before(points.unmerge, self.merge_residual)
        patch.first_after(points.block, self.leave)

    @staticmethod
    def whole_attention(points: HookPoints) -> nn.Module:
        return points.block.get_submodule("attention")

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        by_heads: Tensor = output.unflatten(-1, (-1, self.attention.attention_head_size))
        return by_heads

    def merge_residual(self, output: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden, residual = args
        return (hidden, self.forward.merge(self.index, residual)), kwargs

    def leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor:
        return self.finish(block, output)


class _Blip(BiasedKeys):
    """One module projects queries, keys and values together."""

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        super().install_attention(patch, points)
        patch.after(points.attention, self.drop_bias)

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.embed_dim)

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        parts = output.unflatten(-1, (3, self.attention.num_heads, self.attention.head_dim))
        part: Tensor = parts[:, :, "qkv".index(name)]
        return part

    def drop_bias(self, attention: nn.Module, args: Args, output: Any) -> Any:
        """The values carry the bias as well, and what attention gives with them."""
        attended, *rest = output
        return (attended.tensor if isinstance(attended, _WeighedKeys) else attended, *rest)


_ATTENTION = "attention.attention"
_BLOCK = Places(
    "layernorm_before",
    _ATTENTION,
    "layernorm_after",
    "output",
    f"{_ATTENTION}.query",
    f"{_ATTENTION}.key",
    f"{_ATTENTION}.value",
)
_VIDEOMAE = replace(
    TRANSFORMERS, places={"VideoMAELayer": _BLOCK, "DPTViTLayer": _BLOCK}, layer=_VideoMAE
)
register(_VIDEOMAE, "transformers.VideoMAEModel")
register(
    replace(_VIDEOMAE, tokens=lambda model: model.embeddings.position_embeddings.shape[1]),
    "transformers.DPTModel",
)

_QKV = "self_attn.qkv"
_BLIP = Places("layer_norm1", "self_attn", "layer_norm2", "mlp", _QKV, _QKV, _QKV)
register(
    replace(
        TRANSFORMERS,
        places={
            "BlipEncoderLayer": _BLIP,
            "Blip2EncoderLayer": _BLIP,
            "InstructBlipEncoderLayer": _BLIP,
            "InstructBlipVideoEncoderLayer": _BLIP,
        },
        tokens=lambda model: model.embeddings.num_positions,
        layer=_Blip,
    ),
    "transformers.BlipVisionModel",
    "transformers.Blip2VisionModel",
    "transformers.InstructBlipVisionModel",
    "transformers.InstructBlipVideoVisionModel",
)
