"""VideoMAE of transformers, and DPT, whose own ViT has the same blocks.

Two things differ from other models. Their attention takes no mask, so the keys carry log(size) to
where the logits are computed. And their MLP ends in a module that adds the residual stream itself:
the residual is merged, and nothing has to be unmerged.
"""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.registry import register
from tomesd.vit.hosts.transformers import TRANSFORMERS
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places


class _WeighedKeys:
    """Keys that carry a bias, [B, 1, 1, N], to the logits of the attention, eager or fused.

    Not a tensor but what torch functions take for one, so that it can hold any kind of tensor. It
    has what the host calls and nothing else: a method that lost the bias must not go unnoticed.
    """

    def __init__(self, keys: Tensor, bias: Tensor):
        self.keys, self.bias = keys, bias

    @property
    def shape(self) -> Any:
        return self.keys.shape

    def view(self, *shape: Any) -> "_WeighedKeys":
        return _WeighedKeys(self.keys.view(*shape), self.bias)

    def transpose(self, first: int, second: int) -> "_WeighedKeys":
        return _WeighedKeys(self.keys.transpose(first, second), self.bias)

    def __mul__(self, factor: float) -> "_WeighedKeys":
        return _WeighedKeys(self.keys * factor, self.bias)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        bias = next(arg.bias for arg in args if isinstance(arg, cls))
        args = [arg.keys if isinstance(arg, cls) else arg for arg in args]
        if func is F.scaled_dot_product_attention:
            return func(*args[:3], **kwargs | {"attn_mask": bias})
        if func is F.softmax:
            return func(args[0] + bias, *args[1:], **kwargs)
        return cls(func(*args, **kwargs), bias)


class _Layer(Layer):
    def install(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)
        patch.before(points.merge, self.merge)
        patch.before(points.unmerge, self.merge_residual)
        patch.first_after(points.block, self.leave)

    @staticmethod
    def whole_attention(points: HookPoints) -> nn.Module:
        return points.block.get_submodule("attention")

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        by_heads: Tensor = output.unflatten(-1, (-1, self.attention.attention_head_size))
        return by_heads

    def carry_bias(self, key: nn.Module, args: Args, output: Tensor) -> Tensor | _WeighedKeys:
        bias = self.forward.key_bias(self.index, args[0], None)
        return output if bias is None else _WeighedKeys(output, bias[:, None, None])

    def merge_residual(self, output: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden, residual = args
        return (hidden, self.forward.merge(self.index, residual)), kwargs

    def leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor:
        return self.finish(block, output)


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
    TRANSFORMERS, places={"VideoMAELayer": _BLOCK, "DPTViTLayer": _BLOCK}, layer=_Layer
)
register(_VIDEOMAE, "transformers.VideoMAEModel")
register(
    replace(_VIDEOMAE, tokens=lambda model: model.embeddings.position_embeddings.shape[1]),
    "transformers.DPTModel",
)
