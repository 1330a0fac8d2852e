"""Tensors that carry a bias to the logits of an attention that takes none."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _carrying(method: str) -> Callable[..., Any]:
    """A tensor's method whose result carries the bias on."""

    def call(self: "Carrier", *args: Any, **kwargs: Any) -> Any:
        return self.carry(getattr(self.tensor, method)(*_plain(args), **kwargs))

    return call


def _plain(args: Any) -> Any:
    """The arguments of a call, with tensors in place of what carries a bias."""
    if isinstance(args, (tuple, list)):
        return tuple(map(_plain, args))
    return args.tensor if isinstance(args, Carrier) else args


def _for_logits(bias: Tensor | None, like: Tensor) -> Tensor | None:
    """The bias of [B, 1, 1, N] with as many dimensions as queries or logits have.

    Attention in windows keeps a dimension for them, after its heads, also where it is global.
    """
    return bias if bias is None or bias.dim() == like.dim() else bias[:, None]


class Carrier:
    """A tensor and the bias that it carries to the logits of the attention, eager or fused.

    bias: [B, 1, 1, N], or None for nothing to add.

    Not a tensor but what torch functions take for one, so that it can hold any kind of tensor. It
    has what the hosts call and nothing else: a method that lost the bias must not go unnoticed.
    """

    def __init__(self, tensor: Tensor, bias: Tensor | None):
        self.tensor, self.bias = tensor, bias

    view, reshape = _carrying("view"), _carrying("reshape")
    reshape_as = _carrying("reshape_as")
    flatten, unflatten = _carrying("flatten"), _carrying("unflatten")
    permute, transpose = _carrying("permute"), _carrying("transpose")
    unsqueeze, to, float = _carrying("unsqueeze"), _carrying("to"), _carrying("float")
    contiguous, unbind = _carrying("contiguous"), _carrying("unbind")
    __getitem__, __neg__ = _carrying("__getitem__"), _carrying("__neg__")
    __add__, __mul__ = _carrying("__add__"), _carrying("__mul__")
    __matmul__ = _carrying("__matmul__")

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

    def softmax(self, dim: int) -> Tensor:
        logits: Any = self
        return F.softmax(logits, dim=dim)

    def carry(self, result: Any) -> Any:
        """What was computed from this, with the bias."""
        if isinstance(result, (tuple, list)):
            return tuple(map(self.carry, result))
        carrier = copy.copy(self)
        carrier.tensor = result
        return carrier

    def total(self, mask: Tensor | None) -> Tensor | None:
        """What to add to the logits. mask: what the host adds."""
        return self.bias

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = args[0] if isinstance(args[0], (tuple, list)) else args
        carrier = next(part for part in parts if isinstance(part, cls))
        args = _plain(args)
        if func is F.scaled_dot_product_attention:
            mask = _for_logits(carrier.total(_plain(kwargs.get("attn_mask"))), args[0])
            return func(*args[:3], **kwargs | {"attn_mask": mask})
        if func is F.softmax:
            bias = _for_logits(carrier.total(None), args[0])
            return func(args[0] if bias is None else args[0] + bias, *args[1:], **kwargs)
        return carrier.carry(func(*args, **kwargs))


def plain_output(attention: torch.nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that takes the bias off what attention gives: values carry it too."""
    return _plain(output)
