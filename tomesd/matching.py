"""Which tokens merge: from token features and a partition to a token map.

Every function here returns a map of exactly `n - r` groups. r is a Python integer from shapes and
settings; nothing depends on the data but the values of the indices.
"""

import torch
from torch import Tensor

from tomesd.partition import Partition, Windows
from tomesd.token_map import TokenMap, rows

# Scores are computed for as many sources at a time as fit in this. All at once they would take
# gigabytes for a 2048 px picture.
SCORE_BYTES = 128 * 2**20

DISTANCES = ("cosine", "dot", "euclidean", "softmax")

# Below any norm that matters: a zero token has a direction of zeros instead of NaN.
_SMALLEST_NORM = 1e-6


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor, partition: Partition | Windows, r: int, distance: str = "cosine"
) -> TokenMap:
    """Merge the r sources that are most similar to a destination into that destination.

    >>> metric = torch.tensor([[[1., 0.], [0., 1.], [0., 2.], [3., 0.1]]])
    >>> sides = Partition(src=torch.tensor([0, 2]), dst=torch.tensor([1, 3]))
    >>> bipartite_soft_matching(metric, sides, r=1).group
    tensor([[0, 1, 1, 2]])

    metric: [B, N, C], the features to compare. No gradient flows through the matching.
    partition: who may merge into whom. In windows, a source looks for its destination in its own
        window, while the r best are still chosen among all sources.
    r: how many sources merge, at most all of them. Of equally similar destinations the first is
        taken; of equally similar sources, those that torch.topk takes.
    distance: how similarity is measured: "cosine" (default: among the best in ToMe, Table 1, and
        blind to how long a token is), "dot" product, "euclidean" distance, or "softmax" of the
        scaled dot products over all destinations, as in attention.
    Raises ValueError if r is negative or above the number of sources, there is no destination, or
        the distance is another.
    Source: ToMe, section 3, Table 1b and Appendix D.
    """
    batch, n, _ = metric.shape
    if isinstance(partition, Windows):
        src, dst, padding = partition
    else:
        src, dst, padding = partition.src[None], partition.dst[None], 0
    n_src = src.numel() - padding
    if not 0 <= r <= n_src:
        raise ValueError(f"r must be from 0 to the {n_src} sources, got {r}")
    if r > 0 and dst.numel() == 0:
        raise ValueError(f"r must be 0 where there is no destination, got {r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    moved = src.flatten().expand(batch, -1)
    if r == 0:
        return TokenMap.from_moves(n, moved[:, :0], moved[:, :0])

    similarity, target = _nearest(metric, src, dst, padding > 0, distance)
    if r < src.numel():
        kept = similarity.topk(r, dim=1, sorted=False).indices
        moved, target = moved.gather(1, kept), target.gather(1, kept)
    return TokenMap.from_moves(n, moved, target)


def _nearest(
    metric: Tensor, src: Tensor, dst: Tensor, is_padded: bool, distance: str
) -> tuple[Tensor, Tensor]:
    """Each source's similarity to its best destination, and which that is: [B, all sources]."""
    batch, windows = metric.shape[0], src.shape[0]
    order = torch.cat([src, dst], dim=1)
    if is_padded:  # Padding looks at the first token, and counts for nothing below.
        order = order.clamp(min=0)
    tokens = rows(metric, order.flatten().expand(batch, -1))
    tokens = tokens.view(batch * windows, -1, metric.shape[2])
    if distance == "cosine":
        tokens.div_(_norms(tokens))  # They are a copy.
    left, right = tokens.split([src.shape[1], dst.shape[1]], dim=1)
    left, right = _factors(left, right, distance)
    right = right.transpose(1, 2)
    count = max(1, SCORE_BYTES // (batch * dst.numel() * left.element_size()))
    values, places = [], []
    for chunk in left.split(count, dim=1):
        scores = torch.bmm(chunk, right).unflatten(0, (batch, windows))
        if is_padded:
            scores = scores.masked_fill(dst[:, None] < 0, -torch.inf)
        if distance == "softmax":
            scores = scores.softmax(-1)
        best = scores.max(dim=-1)
        values.append(best.values)
        places.append(best.indices)
    similarity, nearest = (
        found[0] if len(found) == 1 else torch.cat(found, dim=2) for found in (values, places)
    )
    if is_padded:
        similarity = similarity.masked_fill(src < 0, -torch.inf)
    target = dst.expand(batch, -1, -1).gather(2, nearest)
    return similarity.flatten(1), target.flatten(1)


def _factors(left: Tensor, right: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """Two sides such that the products of their tokens are the similarities."""
    if distance in ("cosine", "dot"):
        return left, right
    left, right = (
        side.to(torch.promote_types(side.dtype, torch.float32)) for side in (left, right)
    )
    if distance == "softmax":
        return left / left.shape[-1] ** 0.5, right
    # −|a − b|² = 2ab − |a|² − |b|²
    of_left, of_right = (side.square().sum(-1, keepdim=True) for side in (left, right))
    return (
        torch.cat([2 * left, -of_left, -torch.ones_like(of_left)], -1),
        torch.cat([right, torch.ones_like(of_right), of_right], -1),
    )


def directions(tokens: Tensor) -> Tensor:
    return (tokens / _norms(tokens)).to(tokens.dtype)


def _norms(tokens: Tensor) -> Tensor:
    # In float32: the norm of a float16 token may be above float16's largest number, and rounded to
    # bfloat16 it would move the cosine by more than the rounding of all channels does.
    wide = torch.promote_types(tokens.dtype, torch.float32)
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide)
    return norm.clamp(min=_SMALLEST_NORM)


def random_pruning(batch: int, n: int, partition: Partition) -> TokenMap:
    """Drop all sources; unmerging fills their places with zeros.

    >>> from tomesd.partition import random
    >>> random_pruning(1, 4, random(4, n_src=1)).m
    3

    batch, n: the tokens' shape. partition: its sources are dropped; `partition.random` with
        n_src=r drops r random tokens, the baseline of ToMe, Tables 2 and 15.
    Raises ValueError if no token would be left.
    """
    if len(partition.src) >= n:
        got = len(partition.src)
        raise ValueError(f"partition must have fewer sources than the {n} tokens, got {got}")
    return TokenMap.from_moves(n, partition.src.expand(batch, -1), None)
