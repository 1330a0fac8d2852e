"""Which tokens merge: from token features and a partition to a token map.

Every function here returns a map of exactly `n - r` groups. r is a Python integer from shapes and
settings; nothing depends on the data but the values of the indices.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tomesd.core.partition import Partition, Windows
from tomesd.core.token_map import TokenMap, in_batch, norms, select

# As many tokens are compared at a time as fit in this, with their scores. All at once they would
# take gigabytes for a 2048 px picture. On the CPU an allocation above 32 MB is mapped anew each
# time, which costs more than what is then done with it; elsewhere fewer calls count for more.
CPU_CHUNK_BYTES, CHUNK_BYTES = 24 * 2**20, 128 * 2**20

DISTANCES = ("cosine", "dot", "euclidean", "softmax")


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor,
    partition: Partition | Windows,
    r: int,
    distance: str = "cosine",
    refine: int = 0,
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
    refine: how often all sources look again, by cosine, for the destination whose group, of all
        sources that found it, is most like them: rounds of spherical k-means in which destinations
        stay where they are. 0 is the papers' matching.
    Raises ValueError if r is negative or above the number of sources, there is no destination, the
        distance is another, or refine is negative or goes with another distance than the cosine.
    Source: ToMe, section 3, Table 1b and Appendix D. Dhillon and Modha, "Concept Decompositions for
    Large Sparse Text Data Using Clustering" (2001) for the rounds.
    """
    batch, n, _ = metric.shape
    if isinstance(partition, Windows):
        windows = partition
    else:
        windows = Windows(torch.cat(partition)[None], len(partition.src), padding=0)
    n_src = windows.src.numel() - windows.padding
    if not 0 <= r <= n_src:
        raise ValueError(f"r must be from 0 to the {n_src} sources, got {r}")
    if r > 0 and windows.dst.numel() == 0:
        raise ValueError(f"r must be 0 where there is no destination, got {r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    if refine < 0 or (refine and distance != "cosine"):
        raise ValueError(
            f"refine must be 0 or, with distance 'cosine', more; got {refine} with {distance!r}"
        )
    if r == 0:
        none = windows.order.new_empty(batch, 0)
        return TokenMap.from_moved_rows(n, none, none)

    similarity, edges = _nearest(metric, windows, distance, refine)
    if r < windows.src.numel():
        kept = similarity.topk(r, dim=1, sorted=False).indices
        edges = edges.gather(2, kept.expand(2, -1, -1))
    return TokenMap.from_moved_rows(n, *edges.unbind())


def _nearest(metric: Tensor, windows: Windows, distance: str, refine: int) -> tuple[Tensor, Tensor]:
    """Each source's similarity to its best destination, [B, all sources], and the edge between
    them, [2, B, all sources]: both as rows of the whole batch."""
    batch, _, channels = metric.shape
    n_src, n_dst = windows.src.shape[1], windows.dst.shape[1]
    room = CPU_CHUNK_BYTES if metric.device.type == "cpu" else CHUNK_BYTES
    room //= batch * metric.itemsize
    # So many windows at a time, and where a single one is too large, so many of its sources.
    count = max(1, room // ((n_src + n_dst) * channels + n_src * n_dst))
    sources = max(1, room // (count * n_dst))
    found = [
        _nearest_at_once(metric, replace(windows, order=part), distance, refine, sources)
        for part in windows.order.split(count)
    ]
    if len(found) == 1:
        return found[0]
    similarity, edges = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return similarity, edges


def _nearest_at_once(
    metric: Tensor, windows: Windows, distance: str, refine: int, sources: int
) -> tuple[Tensor, Tensor]:
    """`_nearest` of some windows, for so many sources of each at a time."""
    order, padding = windows.order, windows.padding
    sides = [windows.src.shape[1], windows.dst.shape[1]]
    places = order.clamp(min=0) if padding else order
    rows = in_batch(places.expand(len(metric), -1, -1), metric.shape[1])
    tokens = select(metric, rows).flatten(0, 1)
    if padding:  # It adds nothing to a group, and counts for nothing below.
        tokens.unflatten(0, (len(metric), -1)).mul_((order >= 0)[..., None])
    if distance == "cosine":
        tokens.div_(norms(tokens))  # They are a copy.
    left, right = tokens.split(sides, dim=1)
    away = windows.dst < 0 if padding else None
    similarity, place = _best(left, right, away, distance, sources)
    for _ in range(refine):
        into = in_batch(place, right.shape[1]).flatten()
        groups = right.flatten(0, 1).index_add(0, into, left.flatten(0, 1)).view_as(right)
        similarity, place = _best(left, directions(groups), away, distance, sources)
    similarity, place = (of.unflatten(0, (len(metric), -1)) for of in (similarity, place))
    if padding:
        similarity = similarity.masked_fill(windows.src < 0, -torch.inf)
    own, others = rows.split(sides, dim=2)
    edges = torch.stack([own, others.gather(2, place)])
    return similarity.flatten(1), edges.flatten(2)


def _best(
    left: Tensor, right: Tensor, away: Tensor | None, distance: str, sources: int
) -> tuple[Tensor, Tensor]:
    """The similarity of each token on the left to its best on the right, and that one's place.

    left, right: [B·windows, tokens, C]. away: [windows, tokens], who on the right is padding.
    sources: compared at a time.
    """
    left, right = _factors(left, right, distance)
    right = right.transpose(1, 2)
    values, places = [], []
    for chunk in left.split(sources, dim=1):
        scores = torch.bmm(chunk, right)
        if away is not None:
            of_window = scores.unflatten(0, (-1, len(away)))
            scores = of_window.masked_fill(away[:, None], -torch.inf).flatten(0, 1)
        if distance == "softmax":
            scores = scores.softmax(-1)
        best = scores.max(dim=-1)
        values.append(best.values)
        places.append(best.indices)
    if len(values) == 1:
        return values[0], places[0]
    return torch.cat(values, dim=1), torch.cat(places, dim=1)


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
    return (tokens / norms(tokens)).to(tokens.dtype)


def random_pruning(batch: int, n: int, partition: Partition) -> TokenMap:
    """Drop all sources; unmerging fills their places with zeros.

    >>> from tomesd.core.partition import random
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
