"""What ToMe's Table 1 compares beside the library's choices: distances and a partition."""

import torch
from torch import Tensor

from tomesd.core.matching import bipartite_soft_matching
from tomesd.core.partition import Partition
from tomesd.core.token_map import TokenMap

DISTANCES = ("cosine", "dot", "euclidean", "softmax")


@torch.no_grad()
def matching_by_distance(
    metric: Tensor, partition: Partition, r: int, distance: str = "cosine"
) -> TokenMap:
    """Bipartite soft matching with another similarity than the cosine.

    >>> metric = torch.tensor([[[1., 0.], [0., 1.], [0., 2.], [3., 0.1]]])
    >>> sides = Partition(src=torch.tensor([0, 2]), dst=torch.tensor([1, 3]))
    >>> matching_by_distance(metric, sides, r=1, distance="dot").group
    tensor([[2, 0, 1, 2]])

    metric: [B, N, C], the features to compare. partition: sources and destinations. r: how many
        sources merge.
    distance: "cosine" is the library's matching; "dot" product, negative squared "euclidean"
        distance, or "softmax" of the scaled dot products over all destinations, as in attention.
    Raises ValueError for another distance. Source: ToMe, Table 1b.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    if distance == "cosine":
        return bipartite_soft_matching(metric, partition, r)
    left, right = metric[:, partition.src], metric[:, partition.dst]
    best = _similarities(left, right, distance).max(dim=-1)
    moved, targets = partition.src.expand(len(metric), -1), partition.dst[best.indices]
    if r < moved.shape[1]:
        chosen = best.values.topk(r, dim=1, sorted=False).indices
        moved, targets = moved.gather(1, chosen), targets.gather(1, chosen)
    return TokenMap.from_moves(metric.shape[1], moved, targets)


def _similarities(left: Tensor, right: Tensor, distance: str) -> Tensor:
    """[B, sources, destinations]."""
    if distance == "dot":
        return left @ right.transpose(1, 2)
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
    if distance == "softmax":
        return (left / left.shape[-1] ** 0.5 @ right.transpose(1, 2)).softmax(-1)
    # −|a − b|² = 2ab − |a|² − |b|², as one product.
    a, b = (side.square().sum(-1, keepdim=True) for side in (left, right))
    left = torch.cat([2 * left, -a, -torch.ones_like(a)], -1)
    right = torch.cat([right, torch.ones_like(b), b], -1)
    return left @ right.transpose(1, 2)


def sequential(n: int, *, prefix: int = 0, device=None) -> Partition:
    """The first half are sources, the second half destinations (ToMe, Table 1e).

    >>> sequential(5)
    Partition(src=tensor([0, 1, 2]), dst=tensor([3, 4]))

    prefix: how many leading tokens are protected.
    """
    tokens = torch.arange(prefix, n, device=device)
    half = (len(tokens) + 1) // 2
    return Partition(tokens[:half], tokens[half:])
