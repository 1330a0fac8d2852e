"""Token merging for one sample, from the papers' definitions, with plain loops over plain lists.

Nothing is shared with tomesd. Tokens are lists of numbers, groups are lists of token places; a map
is a list of groups in the order of their heads, each with its head first.
"""

import math

Tokens = list[list[float]]
Groups = list[list[int]]


def norm(a: list[float]) -> float:
    return math.sqrt(sum(v * v for v in a))


def cosine(a: list[float], b: list[float]) -> float:
    norms = norm(a) * norm(b)
    return sum(v * w for v, w in zip(a, b, strict=True)) / norms if norms > 0 else 0.0


def bipartite_soft_matching(metric: Tokens, src: list[int], dst: list[int], r: int) -> Groups:
    """ToMe, section 3: an edge from each source to its best destination; the r best edges merge."""
    edges = []
    for s in src:
        best = dst[0] if dst else None
        for d in dst[1:]:
            if cosine(metric[s], metric[d]) > cosine(metric[s], metric[best]):
                best = d
        edges.append((cosine(metric[s], metric[best]) if dst else -math.inf, s, best))
    edges.sort(key=lambda edge: edge[0], reverse=True)
    target = {s: d for _, s, d in edges[:r]}
    heads = [token for token in range(len(metric)) if token not in target]
    return [[head] + [s for s in sorted(target) if target[s] == head] for head in heads]


def refined(metric: Tokens, groups: Groups, src: list[int], dst: list[int]) -> Groups:
    """Each source to the group whose mean direction is most like it; destinations stay."""
    centres = {}
    for head, *others in groups:
        if head in dst:
            members = [[v / (norm(metric[t]) or 1.0) for v in metric[t]] for t in (head, *others)]
            centres[head] = [sum(values) for values in zip(*members, strict=True)]
    nearest = {s: max(dst, key=lambda d, s=s: cosine(metric[s], centres[d])) for s in src}
    return [[head] + [s for s in src if nearest[s] == head] for head, *_ in groups]


def merge(x: Tokens, groups: Groups, how: str, weight: list[float] | None = None) -> Tokens:
    merged = []
    for group in groups:
        row = []
        for channel in range(len(x[0])):
            values = [x[token][channel] for token in group]
            weights = [weight[token] if weight else 1.0 for token in group]
            if how == "head":
                row.append(values[0])
            elif how == "max":
                row.append(max(values))
            elif how == "sum":
                row.append(sum(values))
            else:
                weighted = sum(v * w for v, w in zip(values, weights, strict=True))
                row.append(weighted / sum(weights))
        merged.append(row)
        if how == "direction":
            length = norm(x[group[0]]) / norm(row) if norm(row) > 0 else 0.0
            merged[-1] = [value * length for value in row]
    return merged


def unmerge(y: Tokens, groups: Groups, n: int) -> Tokens:
    """Tokens that are in no group were dropped: zeros."""
    x = [[0.0] * len(y[0]) for _ in range(n)]
    for value, group in zip(y, groups, strict=True):
        for token in group:
            x[token] = value
    return x
