"""The kernels as operators, torch.ops.tomesd: torch.compile takes them and autograd knows them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tomesd.kernels import launches


def _operator(function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register torch.ops.tomesd.NAME. fake: the same from shapes alone."""

    def traced(*args: Any) -> Any:
        return function(*args, wrap=wrap_triton)

    signature = inspect.signature(function)
    parameters = [each for each in signature.parameters.values() if each.name != "wrap"]
    traced.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    operator: Any = triton_op(f"tomesd::{function.__name__}", traced, mutates_args=())
    operator.register_fake(fake)
    return operator


def _match(metric: Tensor, order: Tensor, n_src: int) -> tuple[Tensor, Tensor]:
    shape = metric.shape[0], order.shape[0] * n_src
    similarity = metric.new_empty(shape, dtype=torch.float32)
    return similarity, metric.new_empty(shape, dtype=torch.int32)


def _build(
    similarity: Tensor, target: Tensor, order: Tensor, n: int, n_src: int, r: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, m = len(similarity), n - r
    group, head, moved, first = (order.new_empty(batch, count) for count in (n, m, r, m))
    return group, head, moved, similarity.new_empty(batch, m, 1), first


def _rows(x: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*rows.shape, x.shape[2])


match = _operator(launches.match, _match)
build = _operator(launches.build, _build)
merge = _operator(launches.merge, _rows)
merge_backward = _operator(
    launches.merge_backward,
    lambda grad, *others: grad.new_empty(len(grad), others[-1], grad.shape[2]),
)
unmerge = _operator(launches.unmerge, _rows)
add_residual = _operator(launches.add_residual, lambda x, *_: torch.empty_like(x))
