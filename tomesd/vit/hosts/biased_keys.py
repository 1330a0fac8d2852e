"""Layers whose attention takes no mask: VideoMAE and DPT of transformers, BLIP and its kin.

The keys carry log(size) as a tensor subclass, which adds it where the logits are computed.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.registry import register
from tomesd.vit.hosts.transformers import TRANSFORMERS
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places


class _WeighedKeys(Tensor):
    """Keys that carry a bias, [B, 1, 1, N], which attention adds to the logits, eager or fused.

    What is computed from them carries it on, up to the fused kernel or the softmax of the logits.
    """

    bias: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args[:3], **kwargs | {"attn_mask": args[1].bias})
        if func is F.softmax:
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0] + args[0].bias, *args[1:], **kwargs)
        output: Any = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(output, cls):
            output.bias = next(arg.bias for arg in args if isinstance(arg, cls))
        return output


class _BiasedKeys(Layer):
    def install(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)
        patch.before(points.merge, self.merge)
        self.install_after_attention(patch, points)

    def install_after_attention(self, patch: Any, points: HookPoints) -> None:
        raise NotImplementedError(f"{type(self).__name__} merges nothing")

    def carry_bias(self, key: nn.Module, args: Args, output: Tensor) -> Tensor:
        bias = self.forward.key_bias(self.index, args[0], None)
        if bias is None:
            return output
        keys = output.as_subclass(_WeighedKeys)
        keys.bias = bias[:, None, None]
        return keys


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
        by_heads: Tensor = output.unflatten(-1, (-1, self.attention.attention_head_size))
        return by_heads

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
        parts = output.unflatten(-1, (3, self.attention.num_heads, self.attention.head_dim))
        part: Tensor = parts[:, :, "qkv".index(name)]
        return part

    def drop_bias(self, attention: nn.Module, args: Args, output: Any) -> Any:
        """The values carry the bias as well, and what attention gives with them."""
        attended, *rest = output
        return (attended.as_subclass(Tensor), *rest)


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
