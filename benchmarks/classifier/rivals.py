"""The rivals of bipartite matching: the algorithms of ToMe's Table 2, and PiToMe.

All take the same features and return token maps of exactly n − r groups, as `tomesd.core.matching`
does; the first `prefix` tokens are protected. Unlike it, they compare all tokens with all others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomesd.core.matching import directions
from tomesd.core.token_map import TokenMap


@torch.no_grad()
def greedy_matching(metric: Tensor, prefix: int, r: int) -> TokenMap:
    """Merge the two most similar tokens that have not merged yet, r times.

    >>> metric = torch.tensor([[[1., 0.], [0., 1.], [1., 0.1], [0.4, 1.]]])
    >>> greedy_matching(metric, prefix=0, r=1).group
    tensor([[0, 1, 0, 2]])

    metric: [B, N, C]; similarity is the cosine. r: at most half of the free tokens.
    Raises ValueError if r is out of its range. Source: ToMe, Table 2.
    """
    batch, n, _ = metric.shape
    _check(r, (n - prefix) // 2)
    similarity = _cosines(metric)
    places = torch.arange(n, device=metric.device)
    pairs = (places[:, None] < places) & (places[:, None] >= prefix)
    similarity = similarity.masked_fill(~pairs, -torch.inf)
    moved, target = [], []
    for _ in range(r):
        best = similarity.flatten(1).argmax(1, keepdim=True)
        first, second = best // n, best % n
        target.append(first)
        moved.append(second)
        taken = (places == first) | (places == second)
        similarity = similarity.masked_fill(taken[:, :, None] | taken[:, None, :], -torch.inf)
    none = places.new_empty(batch, 0)
    return TokenMap.from_moves(n, torch.cat([none, *moved], 1), torch.cat([none, *target], 1))


@torch.no_grad()
def kmeans(metric: Tensor, prefix: int, r: int, iterations: int = 2) -> TokenMap:
    """Spherical k-means of the free tokens into r fewer clusters.

    >>> metric = torch.tensor([[[1., 0.], [1., 0.1], [0., 1.], [0.1, 1.]]])
    >>> kmeans(metric, prefix=0, r=2).group
    tensor([[0, 0, 1, 1]])

    metric: [B, N, C]. iterations: how often tokens are assigned to the nearest centre; between two
        assignments, centres move to the mean of their clusters. The first centres are tokens evenly
        spaced in the sequence; each stays in its cluster, so that none becomes empty.
    r: less than the number of free tokens.
    Raises ValueError if r or iterations is out of its range.
    Source: ToMe, Table 2, with 2 and 5 iterations.
    """
    batch, n, _ = metric.shape
    free = n - prefix
    _check(r, free - 1)
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
    direction = directions(metric)
    clusters = free - r
    seeds = prefix + torch.arange(clusters, device=metric.device) * free // clusters
    stays = torch.zeros(n, dtype=torch.int8, device=metric.device).index_fill(0, seeds, 1)
    stays[:prefix] = 1
    moved = stays.argsort(stable=True)[:r].expand(batch, -1)
    centres = direction[:, seeds]
    for _ in range(iterations):
        nearest = (direction @ centres.transpose(1, 2)).argmax(-1)
        clustered = TokenMap.from_moves(n, moved, seeds[nearest.gather(1, moved)])
        centres = directions(clustered.merge(direction)[:, prefix:])
    return clustered


@torch.no_grad()
def energy_matching(metric: Tensor, prefix: int, r: int, margin: float) -> TokenMap:
    """PiToMe: of the tokens that are similar to many others, every second one merges.

    >>> metric = torch.tensor([[[0., 1.], [1., 0.], [1., 0.1], [-1., 1.]]])
    >>> energy_matching(metric, prefix=0, r=1, margin=0.9).group.unique().numel()
    3

    A token's energy is its mean similarity to all free tokens, where a similarity below the margin
    counts as exp(similarity − margin) − 1. The 2r tokens of the highest energy, in the order of
    energy, alternate between sources and destinations, and each source merges into its most similar
    destination; all others are protected, so that rare tokens survive.

    metric: [B, N, C]; similarity is the cosine. r: at most half of the free tokens.
    margin: 0.9 in the first layer, falling to 0 after the last, in the paper.
    Raises ValueError if r is out of its range.
    Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging" (2024).
    Its authors' code uses similarity − margin above the margin, where the paper's formula has a
    step; the rest is the same.
    """
    n = metric.shape[1]
    _check(r, (n - prefix) // 2)
    similarity = _cosines(metric[:, prefix:])
    below = torch.exp(similarity - margin) - 1
    energy = torch.where(similarity >= margin, similarity, below).mean(-1)
    crowd = energy.argsort(dim=1, descending=True, stable=True)[:, : 2 * r]
    src, dst = crowd[:, ::2], crowd[:, 1::2]
    rows = similarity.gather(1, src[..., None].expand(-1, -1, n - prefix))
    between = rows.gather(2, dst[:, None].expand(-1, r, -1))
    target = dst.gather(1, between.argmax(-1)) if r else dst
    return TokenMap.from_moves(n, src + prefix, target + prefix)


@torch.no_grad()
def attention_pruning(attention: Tensor, prefix: int, r: int) -> TokenMap:
    """Drop the r tokens that receive the least attention; unmerging fills them with zeros.

    >>> attention_pruning(torch.tensor([[0.5, 0.1, 0.3, 0.2]]), prefix=1, r=1).group
    tensor([[ 0, -1,  1,  2]])

    attention: [B, N], see `received_attention`. r: at most the number of free tokens.
    Raises ValueError if r is out of its range. Source: ToMe, Table 2.
    """
    n = attention.shape[1]
    _check(r, n - prefix)
    least = attention[:, prefix:].argsort(dim=1, stable=True)[:, :r]
    return TokenMap.from_moves(n, least + prefix, None)


@torch.no_grad()
def received_attention(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """The attention that each token receives from the class token, or without one from all tokens,
    averaged over heads.

    q, k: [B, N, H, D]. prefix: the class token is the first of them. Returns [B, N].
    """
    queries = q[:, :1] if prefix else q
    logits = torch.einsum("bqhd,bkhd->bhqk", queries, k) / q.shape[-1] ** 0.5
    return F.softmax(logits.float(), dim=-1).mean((1, 2))


def _cosines(metric: Tensor) -> Tensor:
    direction = directions(metric)
    return direction @ direction.transpose(1, 2)


def _check(r: int, largest: int) -> None:
    if not 0 <= r <= largest:
        raise ValueError(f"r must be from 0 to {largest}, got {r}")
