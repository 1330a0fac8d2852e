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

# Below any norm that matters: a zero token has a direction of zeros instead of NaN.
_SMALLEST_NORM = 1e-6


@torch.no_grad()
def bipartite_soft_matching(metric: Tensor, partition: Partition, r: int) -> TokenMap:
    """Merge the r sources that are most similar to a destination into that destination.

    >>> metric = torch.tensor([[[1., 0.], [0., 1.], [0., 2.], [3., 0.1]]])
    >>> sides = Partition(src=torch.tensor([0, 2]), dst=torch.tensor([1, 3]))
    >>> bipartite_soft_matching(metric, sides, r=1).group
    tensor([[0, 1, 1, 2]])

    metric: [B, N, C], the features to compare; similarity is their cosine. No gradient flows
        through the matching.
    r: how many sources merge, at most all of them. Of equally similar destinations the first is
        taken; of equally similar sources, those that torch.topk takes.
    Raises ValueError if r is negative, above the number of sources, or there is no destination.
    Source: ToMe, section 3 and Appendix D.
    """
    batch, n, _ = metric.shape
    src, dst = partition
    if not 0 <= r <= len(src):
        raise ValueError(f"r must be from 0 to the {len(src)} sources, got {r}")
    if r > 0 and len(dst) == 0:
        raise ValueError(f"r must be 0 where there is no destination, got {r}")
    if r == 0:
        return TokenMap.from_moves(n, src.new_empty(batch, 0), src.new_empty(batch, 0))

    direction = _directions(metric)
    sources, targets = direction[:, src], direction[:, dst].transpose(1, 2)
    rows = max(1, SCORE_BYTES // (batch * len(dst) * metric.element_size()))
    best = [torch.bmm(chunk, targets).max(dim=-1) for chunk in sources.split(rows, dim=1)]
    nearest = torch.cat([chunk.indices for chunk in best], dim=1)
    moved, target = src.expand(batch, -1), dst[nearest]
    if r < len(src):
        similarity = torch.cat([chunk.values for chunk in best], dim=1)
        kept = similarity.topk(r, dim=1, sorted=False).indices
        moved, target = moved.gather(1, kept), target.gather(1, kept)
    return TokenMap.from_moves(n, moved, target)


def _directions(metric: Tensor) -> Tensor:
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
