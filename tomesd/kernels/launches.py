"""Launch the kernels: functions of tensors, each of a few launches and without a host sync.

In eager mode they are called as they are: the dispatcher takes several times as long as a launch.
`tomesd.kernels.operators` makes operators of them, for graphs and gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from tomesd.kernels import matching, merging

HOWS = {"mean": 0, "sum": 1, "direction": 2, "weighted": 3}

Wrap = Callable[[Any], Any]


def direct(kernel: Any) -> Any:
    """Launch the kernel as it is; in an operator, `wrap_triton` puts it into the graph."""
    return kernel


# Elements of a tile of merging: several heads or tokens, and up to 256 of their channels.
_TILE = 2048

# Tokens or sources of a tile of building, and warps and tiles of two of its kernels.
BLOCK, CUT_WARPS, LINK_TILE, LINK_BLOCK = 1024, 8, 64, 64


def match(metric: Tensor, order: Tensor, n_src: int, wrap: Wrap = direct) -> tuple[Tensor, Tensor]:
    """Each source's similarity to its best destination, and which one that is, [B, sources] each.

    metric: [B, N, C]. order: int64 [windows, n_src + n_dst], as in `partition.Windows`.
    """
    batch, n, channels = metric.shape
    windows, width = order.shape
    similarity = metric.new_empty(batch, windows * n_src, dtype=torch.float32)
    target = metric.new_empty(batch, windows * n_src, dtype=torch.int32)
    tile = match_tile(metric.dtype)
    wrap(matching.match_kernel)[(triton.cdiv(n_src, tile["SRC"]), windows, batch)](
        metric, order, similarity, target, n, channels, n_src, width - n_src, **tile
    )
    return similarity, target


def match_tile(dtype: torch.dtype) -> dict[str, int]:
    """Sources, destinations and channels of one tile of scores, and the warps that compute it."""
    if dtype == torch.float32:  # Without tensor cores: smaller tiles, which keep in registers.
        return {"SRC": 32, "DST": 32, "BLOCK": 32, "num_warps": 4, "num_stages": 2}
    return {"SRC": 64, "DST": 64, "BLOCK": 64, "num_warps": 8, "num_stages": 3}


def build(
    similarity: Tensor,
    target: Tensor,
    order: Tensor,
    n: int,
    n_src: int,
    r: int,
    wrap: Wrap = direct,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The map in which the r most similar sources join their targets; of equals, the first.

    similarity, target: as `match` returns them. Returns group_rows [B, N], head_rows [B, M],
    moved_rows [B, r] sorted by group, size [B, M, 1] and first [B, M], as in `TokenMap`.
    """
    batch, sources = similarity.shape
    windows, width = order.shape
    m = n - r
    index: dict[str, Any] = {"dtype": torch.int64, "device": order.device}
    cut = torch.empty(batch, 2, **index)
    into, place = (similarity.new_empty(batch, n, dtype=torch.int32) for _ in range(2))
    group_rows, moved_rows = torch.empty(batch, n, **index), torch.empty(batch, r, **index)
    head_rows, first = torch.empty(batch, m, **index), torch.empty(batch, m, **index)
    size = similarity.new_empty(batch, m, 1)
    wrap(matching.cut_kernel)[(batch,)](
        similarity, order, cut, into, place, r, n, sources, n_src, width,
        BLOCK=BLOCK, num_warps=CUT_WARPS,
    )  # fmt: skip
    wrap(matching.link_kernel)[(triton.cdiv(width, LINK_TILE), windows, batch)](
        similarity, target, order, cut, into, place, n, sources, n_src, width - n_src,
        TILE=LINK_TILE, BLOCK=LINK_BLOCK, num_warps=4,
    )  # fmt: skip
    grid = triton.cdiv(n, BLOCK), batch
    wrap(matching.number_kernel)[grid](
        into, place, group_rows, head_rows, first, size, n, m, r, BLOCK=BLOCK, num_warps=4
    )
    wrap(matching.join_kernel)[grid](
        into, place, group_rows, moved_rows, first, n, BLOCK=BLOCK, num_warps=4
    )
    return group_rows, head_rows, moved_rows, size, first


def merge(
    x: Tensor,
    head_rows: Tensor,
    moved_rows: Tensor,
    first: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    how: str,
    wrap: Wrap = direct,
) -> Tensor:
    """Reduce every group to one token: [B, N, C] → [B, M, C].

    how: "mean", which alone reads size, [B, M, 1]; "sum"; "direction"; or "weighted", which alone
    reads weight, [B, N, 1].
    """
    batch, m = head_rows.shape
    y = x.new_empty(batch, m, x.shape[2])
    tile, grid = tiles(batch * m, x.shape[2], how == "direction")
    wrap(merging.merge_kernel)[grid](
        x, y, head_rows, moved_rows, first,
        x if size is None else size, x if weight is None else weight,
        batch * m, moved_rows.numel(), x.shape[2], HOW=HOWS[how], HEADS=tile[0], BLOCK=tile[1],
        num_warps=4,
    )  # fmt: skip
    return y


def merge_backward(
    grad: Tensor,
    x: Tensor,
    head_rows: Tensor,
    moved_rows: Tensor,
    first: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    how: str,
    n: int,
    wrap: Wrap = direct,
) -> Tensor:
    """The gradient of `merge` for x, [B, N, C], which only "direction" reads."""
    batch, m = head_rows.shape
    channels = grad.shape[2]
    grad_x = grad.new_empty(batch, n, channels)
    tile, grid = tiles(batch * m, channels, how == "direction")
    wrap(merging.merge_backward_kernel)[grid](
        grad, grad if x is None else x, grad_x, head_rows, moved_rows, first,
        grad if size is None else size, grad if weight is None else weight,
        batch * m, moved_rows.numel(), channels, HOW=HOWS[how], HEADS=tile[0], BLOCK=tile[1],
        num_warps=4,
    )  # fmt: skip
    return grad_x


def unmerge(y: Tensor, group_rows: Tensor, wrap: Wrap = direct) -> Tensor:
    """Copy each group to its tokens: [B, M, C] → [B, N, C]; zeros where group_rows is −1."""
    batch, n = group_rows.shape
    out = y.new_empty(batch, n, y.shape[2])
    tile, grid = tiles(batch * n, y.shape[2])
    wrap(merging.unmerge_kernel)[grid](
        y, y, y, out, group_rows, batch * n, y.shape[2],
        RESIDUAL=False, ROWS=tile[0], BLOCK=tile[1], num_warps=4,
    )  # fmt: skip
    return out


def add_residual(
    x: Tensor,
    y: Tensor,
    merged: Tensor,
    group_rows: Tensor,
    wrap: Wrap = direct,
) -> Tensor:
    """x + unmerge(y − merged), [B, N, C], in one pass."""
    out = torch.empty_like(x)
    rows = group_rows.numel()
    tile, grid = tiles(rows, x.shape[2])
    wrap(merging.unmerge_kernel)[grid](
        y, x, merged, out, group_rows, rows, x.shape[2],
        RESIDUAL=True, ROWS=tile[0], BLOCK=tile[1], num_warps=4,
    )  # fmt: skip
    return out


def tiles(
    rows: int, channels: int, whole_rows: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and channels of one tile, and the grid of all."""
    wide = max(16, min(256, triton.next_power_of_2(channels)))
    # What reads whole rows keeps their norms beside the tile, and half of one leaves room for them.
    high = max(1, min(_TILE // (2 * wide if whole_rows else wide), 32))
    return (high, wide), (triton.cdiv(rows, high), 1 if whole_rows else triton.cdiv(channels, wide))
