"""The one data structure of token merging: which of N tokens belong to which of M groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below any norm that matters: a zero token has a direction of zeros instead of NaN.
_SMALLEST_NORM = 1e-6


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A partition of N tokens into M ≤ N groups, for each sample of a batch.

    >>> pairs = TokenMap.from_groups([[0, 0, 1]])
    >>> pairs.merge(torch.tensor([[[1.], [3.], [5.]]]))
    tensor([[[2.],
             [5.]]])

    group: int64 [B, N], the group of each token; −1 for a token that was dropped (pruning).
    head:  int64 [B, M], one token of each group, the one that the others merge into. Groups are
           numbered by their heads' places, so that tokens keep their order.
    moved: int64 [B, K], the tokens that merged into a head; K = N−M where none was dropped. How
           many is fixed by shapes and settings, never by the data: a map costs no host
           synchronisation and compiles.
    size:  float32 [B, M, 1], how many tokens the group holds. float32 also where the tokens are
           bfloat16, which cannot count past 256.

    What is kept are rows: the same numbers counted through the whole batch, b·N or b·M more in
    sample b, since that is how tokens [B, N, C] lie in memory. To select whole rows takes a single
    call, and on the CPU it is several times faster than to gather single elements.

    Source: ToMe, section 3 and Appendix D; the groups are its merged tokens.
    """

    group_rows: Tensor
    head_rows: Tensor
    moved_rows: Tensor
    size: Tensor

    @property
    def group(self) -> Tensor:
        return _in_sample(self.group_rows, self.m)

    @property
    def head(self) -> Tensor:
        return _in_sample(self.head_rows, self.n)

    @property
    def moved(self) -> Tensor:
        return _in_sample(self.moved_rows, self.n)

    @property
    def n(self) -> int:
        """N, the number of tokens."""
        return self.group_rows.shape[1]

    @property
    def m(self) -> int:
        """M, the number of groups."""
        return self.head_rows.shape[1]

    @property
    def drops(self) -> bool:
        """Whether tokens were dropped: some are neither heads nor merged into one."""
        return self.m + self.moved_rows.shape[1] < self.n

    @staticmethod
    def from_moves(n: int, moved: Tensor, target: Tensor | None) -> TokenMap:
        """The map in which each moved token joins a token that stays; without targets, is dropped.

        >>> TokenMap.from_moves(4, torch.tensor([[0, 3]]), torch.tensor([[2, 2]])).group
        tensor([[1, 0, 1, 1]])

        n: the number of tokens. moved: int64 [B, k], distinct. target: int64 [B, k], none of them
        in moved, or None. Neither is checked: that would need a host synchronisation.
        """
        into = None if target is None else in_batch(target, n)
        return TokenMap.from_moved_rows(n, in_batch(moved, n), into)

    @staticmethod
    def from_moved_rows(n: int, moved: Tensor, target: Tensor | None) -> TokenMap:
        """`from_moves` for tokens that are counted through the whole batch.

        >>> moved, target = torch.tensor([[0], [4]]), torch.tensor([[2], [3]])
        >>> TokenMap.from_moved_rows(3, moved, target).group
        tensor([[1, 0, 1],
                [0, 0, 1]])

        n: the number of tokens of each sample. moved, target: int64 [B, k], rows of the batch.
        """
        batch, count = moved.shape
        left = batch * (n - count)
        stays = torch.ones(batch * n, dtype=torch.bool, device=moved.device)
        rank = stays.scatter_(0, moved.flatten(), False).cumsum(0) - 1
        rows = torch.arange(batch * n, device=moved.device)
        # Moved tokens have no place among the heads: they are written to one slot past the end.
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
        return TokenMap(group.view(batch, n), head.view(batch, -1), moved, size.view(batch, -1, 1))

    @staticmethod
    def from_groups(group: Tensor | Sequence[Sequence[int]]) -> TokenMap:
        """The map with these groups; the first token of each is its head.

        >>> TokenMap.from_groups([[0, 0, 1], [1, 0, 1]]).head
        tensor([[0, 2],
                [0, 1]])

        group: [B, N] integers, any labels, the same number of distinct ones in each sample. Groups
        are numbered anew by their heads' places.
        Raises ValueError if the samples have different numbers of groups. Looks at the data: for
        tests, pictures and loading, not for use inside a model.
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
            taken in float32 or wider, so that large groups stay exact in half precision.
            Differentiable.
        weight: [B, N, 1] or None, each token's weight in the mean: the number of original tokens it
            stands for, where merging goes on layer after layer (ToMe's size-weighted average).
            None weighs all alike.
        how: "mean" (default: the best in ToMe, Table 1), "sum", "max", "head", which keeps the
            head's value, or "direction", the mean's direction with the head's length. A mean is
            shorter than what it is of, the more so the less alike they are; where a layer gets
            tokens fresh from a norm it has learned to expect their length. Dropped tokens count
            for nothing.
        Raises ValueError for an unknown `how`, a weight beside a `how` that has no use for it, or
            an x or weight of another shape.
        """
        batch = len(self.size)
        _require_shape("x", x, batch, self.n)
        if how not in ("mean", "sum", "max", "head", "direction"):
            allowed = "'mean', 'sum', 'max', 'head' or 'direction'"
            raise ValueError(f"how must be {allowed}, got {how!r}")
        if weight is not None and how != "mean":
            raise ValueError(f"weight goes with how='mean', got how={how!r}")
        if weight is not None:
            _require_shape("weight", weight, batch, self.n, channels=1)
        if how == "head" or self.moved_rows.shape[1] == 0:
            return select(x, self.head_rows)
        dtype, count = x.dtype, self.size
        wide = torch.promote_types(dtype, torch.float32)
        if weight is not None:
            x, count = x.to(wide) * weight, self.merge(weight.to(wide), how="sum")
        # Both are copies, so that what follows may write into them.
        heads, moved = select(x, self.head_rows), select(x, self.moved_rows).flatten(0, 1)
        into = self.group_rows.flatten().index_select(0, self.moved_rows.flatten())
        if self.drops:  # Some of them may have merged into a head that was dropped later.
            nothing = float("-inf") if how == "max" else 0
            moved, into = moved.masked_fill(into[:, None] < 0, nothing), into.clamp(min=0)
        if how == "max":
            return heads.flatten(0, 1).index_reduce(0, into, moved, "amax").view_as(heads)
        total = heads.to(wide)
        total.flatten(0, 1).index_add_(0, into, moved.to(wide))
        if how == "direction":
            length = select(norms(x), self.head_rows)
            return (total * (length / norms(total))).to(dtype)
        return (total if how == "sum" else total.div_(count)).to(dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every token the value of its group; zeros where it was dropped.

        >>> pairs = TokenMap.from_groups([[0, 0, 1]])
        >>> pairs.unmerge(torch.tensor([[[2.], [5.]]]))
        tensor([[[2.],
                 [2.],
                 [5.]]])

        y: [B, M, C], any dtype and device. Returns [B, N, C]. One gather; differentiable.
        Raises ValueError for a y of another shape.
        Source: ToMe, Appendix F.1 ("unmerge them by simply copying").
        """
        _require_shape("y", y, len(self.size), self.m)
        if self.drops:
            dropped = self.group_rows[..., None] < 0
            return select(y, self.group_rows.clamp(min=0)).masked_fill(dropped, 0)
        return select(y, self.group_rows)

    def then(self, other: TokenMap) -> TokenMap:
        """This map followed by another on its groups: N → M → K as one map N → K.

        >>> first, second = TokenMap.from_groups([[0, 0, 1, 2]]), TokenMap.from_groups([[0, 1, 1]])
        >>> first.then(second).group
        tensor([[0, 0, 1, 1]])

        Raises ValueError if the other map is not on the same batch of M tokens.
        """
        needed, got = self.head_rows.shape, other.group_rows.shape
        if got != needed:
            raise ValueError(f"other must map [batch, tokens] {list(needed)}, got {list(got)}")
        if self.drops:
            group = _pick(other.group_rows, self.group_rows.clamp(min=0))
            group = group.masked_fill(self.group_rows < 0, -1)
        else:
            group = _pick(other.group_rows, self.group_rows)
        moved = _pick(self.head_rows, other.moved_rows)
        return TokenMap(
            group,
            _pick(self.head_rows, other.head_rows),
            torch.cat([self.moved_rows, moved], dim=1),
            other.merge(self.size, how="sum"),
        )

    def repeat(self, times: int) -> TokenMap:
        """The same maps for so many times as many samples.

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
    # A wrong batch must not pass: rows of another sample would be read, or samples lost.
    if x.dim() != 3 or x.shape[:2] != (batch, n) or channels not in (None, x.shape[2]):
        needed = f"[{batch}, {n}, {channels or 'channels'}]"
        raise ValueError(f"{name} must be of shape {needed}, got {list(x.shape)}")


def norms(x: Tensor) -> Tensor:
    """The length of each token, [B, N, 1]; that of a zero token is above zero."""
    # In float32: the norm of a float16 token may be above float16's largest number, and rounded to
    # bfloat16 it would move the cosine by more than the rounding of all channels does.
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.clamp(min=_SMALLEST_NORM)


def in_batch(index: Tensor, n: int) -> Tensor:
    """Places among the n tokens of each sample, [B, ...], as rows of the whole batch."""
    if len(index) == 1:
        return index  # Two calls fewer, which on a GPU cost more than what they do.
    return index + _first_rows(index, n)


def _in_sample(rows: Tensor, n: int) -> Tensor:
    """The reverse; what is −1 stays that."""
    if len(rows) == 1:
        return rows
    return torch.where(rows < 0, rows, rows - _first_rows(rows, n))


def _first_rows(index: Tensor, n: int) -> Tensor:
    first = torch.arange(0, len(index) * n, n, device=index.device)
    return first.view(-1, *(1,) * (index.dim() - 1))


def select(x: Tensor, rows: Tensor) -> Tensor:
    """These rows of x [B, N, C], counted through the whole batch: [*rows, C], a copy."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[2])


def _pick(values: Tensor, rows: Tensor) -> Tensor:
    return values.flatten().index_select(0, rows.flatten()).view_as(rows)
