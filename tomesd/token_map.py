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

    Source: ToMe, section 3 and Appendix D; the groups are its merged tokens.
    """

    group: Tensor
    head: Tensor
    moved: Tensor
    size: Tensor

    @property
    def n(self) -> int:
        """N, the number of tokens."""
        return self.group.shape[1]

    @property
    def m(self) -> int:
        """M, the number of groups."""
        return self.head.shape[1]

    @property
    def drops(self) -> bool:
        """Whether tokens were dropped: some are neither heads nor merged into one."""
        return self.m + self.moved.shape[1] < self.n

    @staticmethod
    def from_moves(n: int, moved: Tensor, target: Tensor | None) -> TokenMap:
        """The map in which each moved token joins a token that stays; without targets, is dropped.

        >>> TokenMap.from_moves(4, torch.tensor([[0, 3]]), torch.tensor([[2, 2]])).group
        tensor([[1, 0, 1, 1]])

        n: the number of tokens. moved: int64 [B, k], distinct. target: int64 [B, k], none of them
        in moved, or None. Neither is checked: that would need a host synchronisation.
        """
        batch, count = moved.shape
        stays = torch.ones(batch, n, dtype=torch.bool, device=moved.device)
        stays = stays.scatter(1, moved, False)
        rank = stays.cumsum(1) - 1
        tokens = torch.arange(n, device=moved.device).expand(batch, n)
        # Moved tokens have no place among the heads: they are written to one slot past the end.
        slot = rank.scatter(1, moved, n - count)
        head = tokens.new_zeros(batch, n - count + 1).scatter(1, slot, tokens)[:, :-1]
        size = torch.ones(batch, n - count, device=moved.device)
        if target is None:
            group, moved = rank.scatter(1, moved, -1), moved[:, :0]
        else:
            joined = rank.gather(1, target)
            group = rank.scatter(1, moved, joined)
            size = size.scatter_add(1, joined, size.new_ones(()).expand_as(joined))
        return TokenMap(group, head, moved, size[..., None])

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
        batch = self.group.shape[0]
        _require_shape("x", x, batch, self.n)
        if how not in ("mean", "sum", "max", "head", "direction"):
            allowed = "'mean', 'sum', 'max', 'head' or 'direction'"
            raise ValueError(f"how must be {allowed}, got {how!r}")
        if weight is not None and how != "mean":
            raise ValueError(f"weight goes with how='mean', got how={how!r}")
        if weight is not None:
            _require_shape("weight", weight, batch, self.n, channels=1)
        if how == "head" or self.moved.shape[1] == 0:
            return rows(x, self.head)
        dtype, count = x.dtype, self.size
        wide = torch.promote_types(dtype, torch.float32)
        if weight is not None:
            x, count = x.to(wide) * weight, self.merge(weight.to(wide), how="sum")
        # Both are copies, so that what follows may write into them.
        heads, moved = rows(x, self.head), rows(x, self.moved)
        group = self.group.gather(1, self.moved)
        if self.drops:  # Some of them may have merged into a head that was dropped later.
            nothing = float("-inf") if how == "max" else 0
            moved, group = moved.masked_fill(group[..., None] < 0, nothing), group.clamp(min=0)
        into = flat(group, self.m)
        if how == "max":
            largest = heads.flatten(0, 1).index_reduce(0, into, moved.flatten(0, 1), "amax")
            return largest.view_as(heads)
        total = heads.to(wide)
        total.flatten(0, 1).index_add_(0, into, moved.to(wide).flatten(0, 1))
        if how == "direction":
            length = norms(x).gather(1, self.head[..., None])
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
        _require_shape("y", y, self.group.shape[0], self.m)
        if self.drops:
            return rows(y, self.group.clamp(min=0)).masked_fill(self.group[..., None] < 0, 0)
        return rows(y, self.group)

    def then(self, other: TokenMap) -> TokenMap:
        """This map followed by another on its groups: N → M → K as one map N → K.

        >>> first, second = TokenMap.from_groups([[0, 0, 1, 2]]), TokenMap.from_groups([[0, 1, 1]])
        >>> first.then(second).group
        tensor([[0, 0, 1, 1]])

        Raises ValueError if the other map is not on the same batch of M tokens.
        """
        needed, got = self.head.shape, other.group.shape
        if got != needed:
            raise ValueError(f"other must map [batch, tokens] {list(needed)}, got {list(got)}")
        group = other.group.gather(1, self.group.clamp(min=0))
        return TokenMap(
            group.masked_fill(self.group < 0, -1) if self.drops else group,
            self.head.gather(1, other.head),
            torch.cat([self.moved, self.head.gather(1, other.moved)], dim=1),
            other.merge(self.size, how="sum"),
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


def flat(index: Tensor, n: int) -> Tensor:
    """Rows of [B, n, C] as rows of [B·n, C].

    Selecting and adding whole rows of a matrix is several times faster on the CPU than gathering
    and scattering single elements with an expanded index.
    """
    if index.shape[0] == 1:
        return index[0]  # Two calls fewer, which on a GPU cost more than what they do.
    start = torch.arange(0, index.shape[0] * n, n, device=index.device)
    return (index + start[:, None]).flatten()


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x [B, N, C] and index [B, K]: [B, K, C], a copy."""
    selected = x.flatten(0, 1).index_select(0, flat(index, x.shape[1]))
    return selected.view(*index.shape, x.shape[2])
