"""Which tokens merge: from token features and a partition to a token map.

Every function here returns a map of exactly `n - r` groups. r is a Python integer that depends on
shapes and settings; only the values of the indices depend on the data.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tomesd import kernels
from tomesd.core.partition import Partition, Windows
from tomesd.core.rows import in_batch, norms, select
from tomesd.core.token_map import TokenMap

# Tokens and their scores are processed in chunks of at most this size: at 2048 px all scores at
# once would take gigabytes. On the CPU the C library maps every allocation above 32 MB anew, which
# costs more than the arithmetic; on other devices fewer calls matter more.
CPU_CHUNK_BYTES, CHUNK_BYTES = 24 * 2**20, 128 * 2**20


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor,
    partition: Partition | Windows,
    r: int,
    refine: int = 0,
) -> TokenMap:
    """Merge the r sources with the highest cosine similarity to their best destination into it.

    >>> metric = torch.tensor([[[1., 0.], [0., 1.], [0., 2.], [3., 0.1]]])
    >>> sides = Partition(src=torch.tensor([0, 2]), dst=torch.tensor([1, 3]))
    >>> bipartite_soft_matching(metric, sides, r=1).group
    tensor([[0, 1, 1, 2]])

    metric: [B, N, C], the features to compare. No gradient flows through the matching.
    partition: sources and destinations. With `Windows`, a source is compared with the destinations
        of its own window only, while the r best are still chosen among all sources.
    r: how many sources merge, at most all of them. Ties: the first of equally similar destinations;
        of equally similar sources, those that torch.topk picks.
    refine: extra rounds of spherical k-means: every source is compared again, with the mean
        directions of the groups found so far; destinations stay fixed. 0 is the papers' matching.
    Raises ValueError if r is negative or above the number of sources, r > 0 without a destination,
        or refine is negative.
    Source: ToMe, section 3, Table 1b and Appendix D. Dhillon and Modha, "Concept Decompositions for
    Large Sparse Text Data Using Clustering" (2001) for the k-means rounds.
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
    if refine < 0:
        raise ValueError(f"refine must be 0 or more, got {refine}")
    if r == 0:
        none = windows.order.new_empty(batch, 0)
        return TokenMap.from_moved_rows(n, none, none)

    if refine == 0 and kernels.usable(metric):
        rows = kernels.token_map(metric, windows.order, windows.src.shape[1], r)
        return TokenMap(*rows)
    similarity, edges = _nearest(metric, windows, refine)
    if r < windows.src.numel():
        kept = similarity.topk(r, dim=1, sorted=False).indices
        edges = edges.gather(2, kept.expand(2, -1, -1))
    return TokenMap.from_moved_rows(n, *edges.unbind())


def _nearest(metric: Tensor, windows: Windows, refine: int) -> tuple[Tensor, Tensor]:
    """Each source's similarity to its best destination, [B, sources], and the edges between them as
    rows of the batch, [2, B, sources]."""
    batch, _, channels = metric.shape
    n_src, n_dst = windows.src.shape[1], windows.dst.shape[1]
    room = CPU_CHUNK_BYTES if metric.device.type == "cpu" else CHUNK_BYTES
    room //= max(1, batch) * metric.itemsize
    # `count` windows per chunk and, if a single window is too large, `sources` of its sources.
    count = max(1, room // ((n_src + n_dst) * channels + n_src * n_dst))
    sources = max(1, room // (count * n_dst))
    found = [
        _nearest_in_chunk(metric, replace(windows, order=part), refine, sources)
        for part in windows.order.split(count)
    ]
    if len(found) == 1:
        return found[0]
    similarity, edges = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return similarity, edges


def _nearest_in_chunk(
    metric: Tensor, windows: Windows, refine: int, sources: int
) -> tuple[Tensor, Tensor]:
    """`_nearest` for some windows, comparing `sources` tokens of each at a time."""
    order, padding = windows.order, windows.padding
    sides = [windows.src.shape[1], windows.dst.shape[1]]
    places = order.clamp(min=0) if padding else order
    rows = in_batch(places.expand(len(metric), -1, -1), metric.shape[1])
    tokens = select(metric, rows).flatten(0, 1)
    if padding:  # Zeros add nothing to a group; their similarities are masked below.
        tokens.unflatten(0, (len(metric), len(order))).mul_((order >= 0)[..., None])
    tokens.div_(norms(tokens))  # In place: `select` made a copy.
    left, right = tokens.split(sides, dim=1)
    padded = windows.dst < 0 if padding else None
    similarity, place = _best(left, right, padded, sources)
    for _ in range(refine):
        into = in_batch(place, right.shape[1]).flatten()
        groups = right.flatten(0, 1).index_add(0, into, left.flatten(0, 1)).view_as(right)
        similarity, place = _best(left, directions(groups), padded, sources)
    similarity, place = (of.unflatten(0, (len(metric), len(order))) for of in (similarity, place))
    if padding:
        similarity = similarity.masked_fill(windows.src < 0, -torch.inf)
    own, others = rows.split(sides, dim=2)
    edges = torch.stack([own, others.gather(2, place)])
    return similarity.flatten(1), edges.flatten(2)


def _best(
    left: Tensor, right: Tensor, padded: Tensor | None, sources: int
) -> tuple[Tensor, Tensor]:
    """The largest dot product of each token on the left with one on the right, and its position.

    left, right: [B·windows, tokens, C]. padded: bool [windows, tokens] of the right side.
    sources: how many tokens of the left side to compare at a time.
    """
    right = right.transpose(1, 2)
    values, places = [], []
    for chunk in left.split(sources, dim=1):
        scores = torch.bmm(chunk, right)
        if padded is not None:
            by_window = scores.unflatten(0, (-1, len(padded)))
            scores = by_window.masked_fill(padded[:, None], -torch.inf).flatten(0, 1)
        best = scores.max(dim=-1)
        values.append(best.values)
        places.append(best.indices)
    if len(values) == 1:
        return values[0], places[0]
    return torch.cat(values, dim=1), torch.cat(places, dim=1)


def directions(tokens: Tensor) -> Tensor:
    """Tokens scaled to unit norm; zero tokens stay zero."""
    return (tokens / norms(tokens)).to(tokens.dtype)


def random_pruning(batch: int, n: int, partition: Partition) -> TokenMap:
    """Drop all sources; unmerging fills them with zeros.

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
