"""Which tokens merge: from token features and a partition to a token map.

Every function here returns a map of exactly `n - r` groups. r is a Python integer from shapes and
settings; nothing depends on the data but the values of the indices.
"""

import torch
from torch import Tensor

from tomesd.partition import Partition
from tomesd.token_map import TokenMap

# Scores are computed for as many sources at a time as fit in this. All at once they would take
# gigabytes for a 2048 px picture.
SCORE_BYTES = 128 * 2**20

DISTANCES = ("cosine", "dot", "euclidean", "softmax")

# Below any norm that matters: a zero token has a direction of zeros instead of NaN.
_SMALLEST_NORM = 1e-6


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor, partition: Partition, r: int, distance: str = "cosine"
) -> TokenMap:
    """Merge the r sources that are most similar to a destination into that destination.

    >>> metric = torch.tensor([[[1., 0.], [0., 1.], [0., 2.], [3., 0.1]]])
    >>> sides = Partition(src=torch.tensor([0, 2]), dst=torch.tensor([1, 3]))
    >>> bipartite_soft_matching(metric, sides, r=1).group
    tensor([[0, 1, 1, 2]])

    metric: [B, N, C], the features to compare. No gradient flows through the matching.
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
    src, dst = partition
    if not 0 <= r <= len(src):
        raise ValueError(f"r must be from 0 to the {len(src)} sources, got {r}")
    if r > 0 and len(dst) == 0:
        raise ValueError(f"r must be 0 where there is no destination, got {r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    if r == 0:
        return TokenMap.from_moves(n, src.new_empty(batch, 0), src.new_empty(batch, 0))

    left, right = _factors(metric, distance)
    sources, targets = left[:, src], right[:, dst].transpose(1, 2)
    rows = max(1, SCORE_BYTES // (batch * len(dst) * left.element_size()))
    scores = (torch.bmm(chunk, targets) for chunk in sources.split(rows, dim=1))
    if distance == "softmax":
        scores = (chunk.softmax(-1) for chunk in scores)
    best = [chunk.max(dim=-1) for chunk in scores]
    nearest = torch.cat([chunk.indices for chunk in best], dim=1)
    moved, target = src.expand(batch, -1), dst[nearest]
    if r < len(src):
        similarity = torch.cat([chunk.values for chunk in best], dim=1)
        kept = similarity.topk(r, dim=1, sorted=False).indices
        moved, target = moved.gather(1, kept), target.gather(1, kept)
    return TokenMap.from_moves(n, moved, target)


def _factors(metric: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """What to multiply, [B, N, C'] each, so that the products are similarities."""
    if distance == "cosine":
        direction = directions(metric)
        return direction, direction
    if distance == "dot":
        return metric, metric
    wide = metric.to(torch.promote_types(metric.dtype, torch.float32))
    if distance == "softmax":
        return wide / metric.shape[-1] ** 0.5, wide
    # −|a − b|² = 2ab − |a|² − |b|²
    square, one = wide.square().sum(-1, keepdim=True), torch.ones_like(wide[..., :1])
    return torch.cat([2 * wide, -square, -one], -1), torch.cat([wide, one, square], -1)


def directions(metric: Tensor) -> Tensor:
    # The norm in float32: that of a float16 token may be above float16's largest number, and
    # rounded to bfloat16 it would move the cosine by more than the rounding of all channels does.
    wide = torch.promote_types(metric.dtype, torch.float32)
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True, dtype=wide)
    return (metric / norm.clamp(min=_SMALLEST_NORM)).to(metric.dtype)


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
