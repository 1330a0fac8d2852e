"""The one data structure of token merging: which of N tokens belong to which of M groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tomesd import kernels
from tomesd.core.rows import (
    add_rows,
    fixed,
    in_batch,
    in_sample,
    is_exporting,
    largest_rows,
    norms,
    rows_of_moves,
    select,
    select_each,
)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A partition of N tokens into M ≤ N groups, for each sample of a batch.

    >>> pairs = TokenMap.from_groups([[0, 0, 1]])
    >>> pairs.merge(torch.tensor([[[1.], [3.], [5.]]]))
    tensor([[[2.],
             [5.]]])

    group: int64 [B, N], the group of each token; −1 for a dropped token (pruning).
    head:  int64 [B, M], the destination of each group, which the other tokens merge into. Groups
           are numbered by the positions of their heads, so tokens keep their order.
    moved: int64 [B, K], the tokens that merged into a head; K = N−M if no token was dropped. K
           depends on shapes and settings, never on the data: a map costs no host sync and compiles.
    size:  float32 [B, M, 1], the number of tokens in each group. float32 even for bfloat16 tokens:
           bfloat16 cannot count past 256.
    first: int64 [B, M], where the tokens that merged into each head begin in moved_rows, all
           samples' together; None if they are not sorted by group. Only GPU kernels read it.

    group_rows, head_rows and moved_rows hold the same as rows of the whole batch
    (`tomesd.core.rows`); that is what is stored.

    Source: ToMe, section 3 and Appendix D; the groups are its merged tokens.
    """

    group_rows: Tensor
    head_rows: Tensor
    moved_rows: Tensor
    size: Tensor
    first: Tensor | None = None

    @property
    def group(self) -> Tensor:
        return in_sample(self.group_rows, self.m)

    @property
    def head(self) -> Tensor:
        return in_sample(self.head_rows, self.n)

    @property
    def moved(self) -> Tensor:
        return in_sample(self.moved_rows, self.n)

    @property
    def n(self) -> int:
        """N, the number of tokens."""
        return fixed(self.group_rows.shape[1])

    @property
    def m(self) -> int:
        """M, the number of groups."""
        return fixed(self.head_rows.shape[1])

    @property
    def drops(self) -> bool:
        """Whether some tokens were dropped: they are neither heads nor merged into one."""
        return self.m + fixed(self.moved_rows.shape[1]) < self.n

    @staticmethod
    def from_moves(n: int, moved: Tensor, target: Tensor | None) -> TokenMap:
        """The map in which each moved token joins its target, or is dropped if there is none.

        >>> TokenMap.from_moves(4, torch.tensor([[0, 3]]), torch.tensor([[2, 2]])).group
        tensor([[1, 0, 1, 1]])

        n: the number of tokens. moved: int64 [B, k], distinct. target: int64 [B, k], disjoint from
        moved, or None. Neither is checked: that would need a host sync.
        """
        into = None if target is None else in_batch(target, n)
        return TokenMap.from_moved_rows(n, in_batch(moved, n), into)

    @staticmethod
    def from_moved_rows(n: int, moved: Tensor, target: Tensor | None) -> TokenMap:
        """`from_moves` for rows of the batch.

        >>> moved, target = torch.tensor([[0], [4]]), torch.tensor([[2], [3]])
        >>> TokenMap.from_moved_rows(3, moved, target).group
        tensor([[1, 0, 1],
                [0, 0, 1]])

        n: the number of tokens of each sample. moved, target: int64 [B, k].
        """
        if is_exporting():
            return TokenMap(*rows_of_moves(n, moved, target))
        batch, count = moved.shape
        left = batch * (n - count)
        # Made of `moved`, so that torch.func.vmap lets it be written to.
        stays = moved.new_ones(batch * n, dtype=torch.bool)
        rank = stays.scatter_(0, moved.flatten(), False).cumsum(0) - 1
        rows = torch.arange(batch * n, device=moved.device)
        # Moved tokens are no heads: they are all written to one slot past the end.
        slot = rank.scatter(0, moved.flatten(), left)
        head = rows.scatter(0, slot, rows)[:left]
        one = torch.ones((), device=moved.device)
        if target is None:
            group = rank.scatter_(0, moved.flatten(), -1)
            size, moved = one.expand(left), moved[:, :0]
        else:
            joined = rank.index_select(0, target.flatten())
            group = rank.scatter_(0, moved.flatten(), joined)
            size = one.expand(left).scatter_add(0, joined, one.expand(batch * count))
        head, size = head.view(batch, n - count), size.view(batch, n - count, 1)
        return TokenMap(group.view(batch, n), head, moved, size)

    @staticmethod
    def identity(x: Tensor) -> TokenMap:
        """The map of tokens [B, N, C] in which each token is a group of its own.

        >>> TokenMap.identity(torch.zeros(1, 3, 8)).group
        tensor([[0, 1, 2]])
        """
        none = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
        return TokenMap.from_moved_rows(x.shape[1], none, none)

    @staticmethod
    def from_groups(group: Tensor | Sequence[Sequence[int]]) -> TokenMap:
        """The map with these groups; the first token of each is its head.

        >>> TokenMap.from_groups([[0, 0, 1], [1, 0, 1]]).head
        tensor([[0, 2],
                [0, 1]])

        group: [B, N] integers, any labels, the same number of distinct ones in each sample. Groups
        are renumbered by the positions of their heads.
        Raises ValueError if the samples have different numbers of groups. Reads the data (a host
        sync): for tests, pictures and loading, not for use inside a model.
        """
        labels = torch.as_tensor(group)
        if labels.dim() != 2:
            raise ValueError(f"group must be [batch, tokens], got shape {tuple(labels.shape)}")
        # Each token's first equal: labels[b, i] == labels[b, j] with the smallest j.
        first = (labels[:, :, None] == labels[:, None, :]).int().argmax(-1)
        tokens = torch.arange(labels.shape[1], device=labels.device)
        moves = first != tokens
        counts = moves.sum(1)
        if (counts != counts[0]).any():
            groups = (labels.shape[1] - counts).tolist()
            raise ValueError(f"group must have as many groups in each sample, got {groups}")
        moved = moves.nonzero()[:, 1].view(labels.shape[0], -1)
        return TokenMap.from_moves(labels.shape[1], moved, first.gather(1, moved))

    def merge(self, x: Tensor, weight: Tensor | None = None, how: str = "mean") -> Tensor:
        """Reduce every group to one token.

        >>> pairs = TokenMap.from_groups([[0, 0, 1]])
        >>> pairs.merge(torch.tensor([[[1.], [3.], [5.]]]), how="max")
        tensor([[[3.],
                 [5.]]])

        x: [B, N, C], any float dtype and device. Returns [B, M, C] in the same dtype; sums are
            accumulated in float32 or wider, so large groups stay exact in half precision.
            Differentiable.
        weight: [B, N, 1] or None, each token's weight in the mean: the number of original tokens it
            stands for, where every layer merges (ToMe's size-weighted average). None: all equal.
        how: "mean" (default: the best in ToMe, Table 1), "sum", "max", "head" (keep the head's
            value), or "direction": the mean rescaled to its head's norm. Averaging shrinks tokens,
            the more the less alike they are, and a layer behind a norm has learned to expect their
            norm. Dropped tokens are ignored.
        Raises ValueError for an unknown `how`, a weight with a `how` that ignores weights, or an x
            or weight of another shape.
        """
        batch = self.size.shape[0]
        _require_shape("x", x, batch, self.n)
        if how not in ("mean", "sum", "max", "head", "direction"):
            allowed = "'mean', 'sum', 'max', 'head' or 'direction'"
            raise ValueError(f"how must be {allowed}, got {how!r}")
        if weight is not None and how != "mean":
            raise ValueError(f"weight goes with how='mean', got how={how!r}")
        if weight is not None:
            _require_shape("weight", weight, batch, self.n, channels=1)
        if how == "head" or fixed(self.moved_rows.shape[1]) == 0:
            return select(x, self.head_rows)
        if how != "max" and kernels.usable(x, constants=(weight,)):
            return kernels.merge(x, self, weight, how)
        dtype, count = x.dtype, self.size
        wide = torch.promote_types(dtype, torch.float32)
        if weight is not None:
            x, count = x.to(wide) * weight, self.merge(weight.to(wide), how="sum")
        # Both are copies, so they can be written in place below.
        heads, moved = select(x, self.head_rows), select(x, self.moved_rows)
        into = select_each(self.group_rows, self.moved_rows)
        if self.drops:  # A token may have merged into a head that was dropped later.
            nothing = float("-inf") if how == "max" else 0
            moved, into = moved.masked_fill(into[..., None] < 0, nothing), into.clamp(min=0)
        if how == "max":
            return largest_rows(heads, into, moved)
        total = add_rows(heads.to(wide), into, moved.to(wide))
        if how == "direction":
            length = select(norms(x), self.head_rows)
            return (total * (length / norms(total))).to(dtype)
        return (total if how == "sum" else total.div_(count)).to(dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy the value of each group to its tokens; dropped tokens get zeros.

        >>> pairs = TokenMap.from_groups([[0, 0, 1]])
        >>> pairs.unmerge(torch.tensor([[[2.], [5.]]]))
        tensor([[[2.],
                 [2.],
                 [5.]]])

        y: [B, M, C], any dtype and device. Returns [B, N, C]. One gather; differentiable.
        Raises ValueError for a y of another shape.
        Source: ToMe, Appendix F.1 ("unmerge them by simply copying").
        """
        _require_shape("y", y, self.size.shape[0], self.m)
        if kernels.usable(y):
            return kernels.unmerge(y, self)
        if self.drops:
            dropped = self.group_rows[..., None] < 0
            return select(y, self.group_rows.clamp(min=0)).masked_fill(dropped, 0)
        return select(y, self.group_rows)

    def then(self, other: TokenMap) -> TokenMap:
        """Compose with a map on the groups of this one: N → M → K as one map N → K.

        >>> first, second = TokenMap.from_groups([[0, 0, 1, 2]]), TokenMap.from_groups([[0, 1, 1]])
        >>> first.then(second).group
        tensor([[0, 0, 1, 1]])

        Raises ValueError if the other map does not take the same batch of M tokens.
        """
        needed, got = self.head_rows.shape, other.group_rows.shape
        if got != needed:
            raise ValueError(f"other must map [batch, tokens] {list(needed)}, got {list(got)}")
        if self.drops:
            group = select_each(other.group_rows, self.group_rows.clamp(min=0))
            group = group.masked_fill(self.group_rows < 0, -1)
        else:
            group = select_each(other.group_rows, self.group_rows)
        moved = select_each(self.head_rows, other.moved_rows)
        return TokenMap(
            group,
            select_each(self.head_rows, other.head_rows),
            torch.cat([self.moved_rows, moved], dim=1),
            other.merge(self.size, how="sum"),
        )

    def repeat(self, times: int) -> TokenMap:
        """The same maps for `times` as many samples.

        >>> TokenMap.from_groups([[0, 0, 1]]).repeat(2).group
        tensor([[0, 0, 1],
                [0, 0, 1]])
        """

        def repeated(rows: Tensor, n: int) -> Tensor:
            copies = in_batch(rows.expand(times, -1, -1), len(rows) * n)
            return torch.where(rows < 0, rows, copies).flatten(0, 1)

        return TokenMap(
            repeated(self.group_rows, self.m),
            repeated(self.head_rows, self.n),
            repeated(self.moved_rows, self.n),
            self.size.repeat(times, 1, 1),
        )


def _require_shape(name: str, x: Tensor, batch: int, n: int, channels: int | None = None) -> None:
    # A wrong batch must not pass: it would read rows of other samples, or lose samples. While
    # tracing, sizes are tensors, and the trace would hold their comparison.
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    if x.dim() != 3 or x.shape[:2] != (batch, n) or channels not in (None, x.shape[2]):
        needed = f"[{batch}, {n}, {channels or 'channels'}]"
        raise ValueError(f"{name} must be of shape {needed}, got {list(x.shape)}")
