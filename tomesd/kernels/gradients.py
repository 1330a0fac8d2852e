"""Merging and unmerging for autograd: each is the other's gradient, in one launch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tomesd.kernels import launches, operators


def call(name: str, *args: Any) -> Any:
    """Launch a kernel now, or put it into the graph that is being made."""
    if torch.compiler.is_compiling():
        return getattr(operators, name)(*args)
    device = args[0].device
    # Triton launches on the current GPU, where the tensors need not be.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return getattr(launches, name)(*args)
    return getattr(launches, name)(*args)


def _sums(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of unmerging: the sum of each group."""
    summed: Tensor = call("merge", grad.contiguous(), *ctx.saved_tensors, None, None, "sum")
    return summed


class Merge(torch.autograd.Function):
    """`launches.merge`; no gradient for the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head_rows: Tensor,
        moved_rows: Tensor,
        first: Tensor,
        size: Tensor,
        weight: Tensor | None,
        how: str,
    ) -> Tensor:
        ctx.how, ctx.n = how, x.shape[1]
        kept = x if how == "direction" else None
        ctx.save_for_backward(kept, head_rows, moved_rows, first, size, weight)
        merged: Tensor = call("merge", x, head_rows, moved_rows, first, size, weight, how)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        of_x = call("merge_backward", grad, *ctx.saved_tensors, ctx.how, ctx.n)
        return of_x, None, None, None, None, None, None


class Unmerge(torch.autograd.Function):
    """`launches.unmerge`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group_rows: Tensor, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(*rows)
        unmerged: Tensor = call("unmerge", y, group_rows)
        return unmerged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sums(ctx, grad), None, None, None, None


class AddResidual(torch.autograd.Function):
    """`launches.add_residual`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, merged: Tensor, group_rows: Tensor, *rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*rows)
        added: Tensor = call("add_residual", x, y, merged, group_rows)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_y = _sums(ctx, grad)
        return grad, of_y, -of_y, None, None, None, None
