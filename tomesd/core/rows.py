"""Rows of a batch of tokens [B, N, C], numbered through the whole batch as they lie in memory.

Token i of sample b is row b·N + i. Selecting whole rows takes a single call, and on the CPU it is
several times faster than gathering single elements.

In a graph that is exported, where the size of the batch is unknown, rows are numbered in each
sample instead: row i is token i. Nothing but the functions here may depend on which it is.
"""

import torch
from torch import Tensor

from tomesd.kernels import device

# Below any norm that matters: a zero token gets a direction of zeros instead of NaN.
_SMALLEST_NORM = 1e-6


def select(x: Tensor, rows: Tensor) -> Tensor:
    """Copy these rows of x.

    >>> select(torch.tensor([[[1.], [2.]], [[3.], [4.]]]), torch.tensor([[1], [2]]))
    tensor([[[2.]],
    <BLANKLINE>
            [[3.]]])

    x: [B, N, C]. rows: int64 of any shape. Returns [*rows.shape, C].
    """
    if is_exporting():
        # view and not unflatten, of which the older ONNX exporter makes a tensor of fixed size.
        return x.gather(1, _whole(rows.flatten(1), x)).view(*rows.shape, x.shape[2])
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[2])


def select_each(values: Tensor, rows: Tensor) -> Tensor:
    """`select` for values without channels, [B, N]; returns the shape of rows."""
    if is_exporting():
        return values.gather(1, rows)
    return values.flatten().index_select(0, rows.flatten()).view_as(rows)


def add_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add values [B, K, C] to these rows [B, K] of x [B, N, C], which is written to."""
    if is_exporting():
        return x.scatter_add(1, _whole(rows, values), values)
    x.flatten(0, 1).index_add_(0, rows.flatten(), values.flatten(0, 1))
    return x


def largest_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The larger one of these rows [B, K] of x [B, N, C] and the values [B, K, C]."""
    if is_exporting():
        return x.scatter_reduce(1, _whole(rows, values), values, "amax")
    into, flat = rows.flatten(), values.flatten(0, 1)
    return x.flatten(0, 1).index_reduce(0, into, flat, "amax").view_as(x)


def in_batch(index: Tensor, n: int) -> Tensor:
    """Positions among the n tokens of each sample, [B, ...], as rows of the batch."""
    if is_exporting() or len(index) == 1:
        return index  # Two calls fewer, which cost more on a GPU than what they do.
    return index + _first_rows(index, n)


def in_sample(rows: Tensor, n: int) -> Tensor:
    """The inverse of `in_batch`; −1 (a dropped token) stays −1."""
    if is_exporting() or len(rows) == 1:
        return rows
    return torch.where(rows < 0, rows, rows - _first_rows(rows, n))


def norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each token, [B, N, 1], at least 1e-6."""
    # In float32: the norm of a float16 token may exceed float16's range, and rounding it to
    # bfloat16 would move the cosine by more than the rounding of all channels does.
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.clamp(min=_SMALLEST_NORM)


def _first_rows(index: Tensor, n: int) -> Tensor:
    first = torch.arange(0, len(index) * n, n, device=index.device)
    return first.view(-1, *(1,) * (index.dim() - 1))


def rows_of_moves(
    n: int, moved: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `TokenMap.from_moved_rows` where rows are numbered in each sample."""
    count, device = fixed(moved.shape[1]), moved.device
    # No size of the batch is read: the older ONNX exporter may take it for a constant.
    zero = 0 * moved.sum(1, keepdim=True)
    tokens = torch.arange(n, device=device) + zero
    stays = (tokens >= 0).long().scatter(1, moved, 0 * moved)
    rank = stays.cumsum(1) - 1
    # Moved tokens are no heads: they are all written to the last slot, which is past the end.
    head = tokens.scatter(1, rank.where(stays > 0, n - 1), tokens)[:, : n - count]
    size = (head >= 0).float()
    if target is None:
        return rank.where(stays > 0, -1), head, moved[:, :0], size[..., None]
    joined = rank.gather(1, target)
    size = size.scatter_add(1, joined, (joined >= 0).float())
    return rank.scatter(1, moved, joined), head, moved, size[..., None]


def _whole(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [B, K] as an index of all channels of x."""
    return rows[..., None].expand(-1, -1, x.shape[2])


def fixed(size: int) -> int:
    """A size that is the same for every input: a number also where torch.jit.trace has a tensor."""
    return int(size) if isinstance(size, Tensor) else size


def is_exporting() -> bool:
    """Whether torch.export or torch.jit.trace records this, for batches of any size."""
    return device.is_exporting() or is_tracing()


def is_tracing() -> bool:
    """Whether torch.jit.trace records this: sizes are tensors then."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
