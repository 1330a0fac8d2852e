"""Rows of a batch of tokens [B, N, C], numbered through the whole batch as they lie in memory.

Token i of sample b is row b·N + i. Selecting whole rows takes a single call, and on the CPU it is
several times faster than gathering single elements.
"""

import torch
from torch import Tensor

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
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[2])


def select_each(values: Tensor, rows: Tensor) -> Tensor:
    """`select` for values without channels, [B, N]; returns the shape of rows."""
    return values.flatten().index_select(0, rows.flatten()).view_as(rows)


def in_batch(index: Tensor, n: int) -> Tensor:
    """Positions among the n tokens of each sample, [B, ...], as rows of the batch."""
    if len(index) == 1:
        return index  # Two calls fewer, which cost more on a GPU than what they do.
    return index + _first_rows(index, n)


def in_sample(rows: Tensor, n: int) -> Tensor:
    """The inverse of `in_batch`; −1 (a dropped token) stays −1."""
    if len(rows) == 1:
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
