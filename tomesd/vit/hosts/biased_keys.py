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

    def call(self: "_WeighedKeys", *args: Any) -> "_WeighedKeys":
        return _WeighedKeys(getattr(self.tensor, method)(*args), self.bias)

    return call


class _WeighedKeys:
    """Keys that carry a bias, [B, 1, 1, N], to the logits of the attention, eager or fused.

    Not a tensor but what torch functions take for one, so that it can hold any kind of tensor. It
    has what the hosts call and nothing else: a method that lost the bias must not go unnoticed.
    """

    def __init__(self, tensor: Tensor, bias: Tensor):
        self.tensor, self.bias = tensor, bias

    view, reshape = _carrying("view"), _carrying("reshape")
    permute, transpose = _carrying("permute"), _carrying("transpose")
    contiguous = _carrying("contiguous")
    __getitem__, __mul__ = _carrying("__getitem__"), _carrying("__mul__")

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def size(self) -> torch.Size:
        return self.tensor.shape

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        bias = next(arg.bias for arg in args if isinstance(arg, cls))
        args = [arg.tensor if isinstance(arg, cls) else arg for arg in args]
        if func is F.scaled_dot_product_attention:
            return func(*args[:3], **kwargs | {"attn_mask": bias})
        if func is F.softmax:
            return func(args[0] + bias, *args[1:], **kwargs)
        return cls(func(*args, **kwargs), bias)


class _BiasedKeys(Layer):
    def install(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)
        patch.before(points.merge, self.merge)
        self.install_after_attention(patch, points)

    def install_after_attention(self, patch: Any, points: HookPoints) -> None:
        raise NotImplementedError(f"{type(self).__name__} merges nothing")

    def carry_bias(self, key: nn.Module, args: Args, output: Tensor) -> Tensor | _WeighedKeys:
        bias = self.forward.key_bias(self.index, args[0], None)
        return output if bias is None else _WeighedKeys(output, bias[:, None, None])


class _VideoMAE(_BiasedKeys):
    """The MLP ends in a module that adds the residual stream itself: the residual is merged, and
    nothing has to be unmerged."""

    def install_after_attention(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.unmerge, self.merge_residual)
        patch.first_after(points.block, self.leave)

    @staticmethod
    def whole_attention(points: HookPoints) -> nn.Module:
        return points.block.get_submodule("attention")

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return output.view(*output.shape[:-1], -1, self.attention.attention_head_size)

    def merge_residual(self, output: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden, residual = args
        return (hidden, self.forward.merge(self.index, residual)), kwargs

    def leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor:
        return self.finish(block, output)


class _Blip(_BiasedKeys):
    """One module projects queries, keys and values together."""

    def install_after_attention(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.attention, self.drop_bias)
        patch.after(points.unmerge, self.unmerge)
        patch.first_after(points.block, self.leave)

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.embed_dim)

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        parts = output.view(
            *output.shape[:-1], 3, self.attention.num_heads, self.attention.head_dim
        )
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
