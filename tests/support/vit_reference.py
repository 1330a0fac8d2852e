"""A Vision Transformer's blocks with token merging, from the paper's definitions, one sample at a
time with plain loops. Nothing is shared with tomesd."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Groups = list[list[int]]


class Block(NamedTuple):
    """What a pre-norm block computes; all on [N, C], q, k and v are [heads, N, D].

    rotate: rotates queries or keys by the places of their tokens. bias: what is added to the
    logits, by the places of queries and keys. after: what follows the sum of the stream and each
    branch. extra: tokens [K, C] that only attention sees, after the others. None if the host does
    no such thing.
    """

    before_attention: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, ...]]
    after_attention: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, list[int]], Tensor] | None = None
    bias: Callable[[list[int]], Tensor] | None = None
    after: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: x)
    extra: Callable[[Tensor], Tensor] | None = None

    def logits(self, q: Tensor, k: Tensor, heads: list[int]) -> Tensor:
        """heads: for each token the place that it has, or that the first of its group has."""
        if self.rotate:
            q, k = self.rotate(q, heads), self.rotate(k, heads)
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        return logits + self.bias(heads) if self.bias else logits


def encode(
    tokens: Tensor,
    blocks: list[Block],
    schedule: list[int],
    prefix: int,
    prop_attn: bool = True,
    hidden: Tensor | None = None,
    suffix: int = 0,
) -> tuple[Tensor, Groups]:
    """The tokens [N, C] of one sample through all blocks: the groups' tokens and their members.

    suffix: how many tokens at the end never merge. hidden: bool [N], tokens that nobody may look at
    and that count for nothing.
    """
    groups = [[i] for i in range(len(tokens))]
    hidden = torch.zeros(len(tokens), dtype=torch.bool) if hidden is None else hidden
    size = [0.0 if h else 1.0 for h in hidden.tolist()]
    for block, r in zip(blocks, schedule, strict=True):
        seen = tokens if block.extra is None else torch.cat([tokens, block.extra(tokens)])
        q, k, v = block.qkv(block.before_attention(seen))
        logits = block.logits(q, k, [group[0] for group in groups])
        for i, s in enumerate(size):
            weight = s if prop_attn or s == 0 else 1.0
            logits[:, :, i] += math.log(weight) if weight > 0 else -math.inf
        attended = logits.softmax(-1) @ v
        branch = block.after_attention(attended.transpose(0, 1).flatten(1))
        n = len(tokens)
        tokens = block.after[0](tokens + branch[:n])
        into = merge_into(k.mean(0)[: n - suffix], r, prefix)
        tokens, size, groups = merged(tokens, size, groups, into)
        tokens = block.after[1](tokens + block.mlp(tokens))
    return tokens, groups


def features(tokens: Tensor, block: Block) -> dict[str, Tensor]:
    """What can tell a block's tokens apart, [heads, N, D] each (one head for whole tokens)."""
    n = len(tokens)
    seen = tokens if block.extra is None else torch.cat([tokens, block.extra(tokens)])
    q, k, v = block.qkv(block.before_attention(seen))
    attended = block.logits(q, k, list(range(n))).softmax(-1) @ v
    branch = block.after_attention(attended.transpose(0, 1).flatten(1))[:n]
    after = block.after[0](tokens + branch)
    q, k, v = (x[:, :n] for x in (q, k, v))
    return {"x_pre": tokens[None], "x": after[None], "q": q, "k": k, "v": v}


def merge_into(metric: Tensor, r: int, prefix: int) -> dict[int, int]:
    """Bipartite soft matching between even and odd tokens: each merged token's target."""
    n = len(metric)
    evens = [i for i in range(n) if i % 2 == 0 and i >= prefix]
    odds = [i for i in range(n) if i % 2 == 1 and i >= prefix]
    edges = []
    for i in evens:
        scores = [torch.cosine_similarity(metric[i], metric[j], dim=0).item() for j in odds]
        if scores:
            edges.append((max(scores), i, odds[scores.index(max(scores))]))
    edges.sort(reverse=True)
    return {i: j for _, i, j in edges[: min(r, (n - prefix) // 2)]}


def merged(
    tokens: Tensor, size: list[float], groups: Groups, into: dict[int, int]
) -> tuple[Tensor, list[float], Groups]:
    stay = [i for i in range(len(tokens)) if i not in into]
    members = [[i] + [j for j in into if into[j] == i] for i in stay]
    rows = []
    for of in members:
        weights = [size[i] for i in of]
        if sum(weights) == 0:
            weights = [1.0] * len(of)
        rows.append(sum(w * tokens[i] for w, i in zip(weights, of, strict=True)) / sum(weights))
    sizes = [sum(size[i] for i in of) for of in members]
    return torch.stack(rows), sizes, [[j for i in of for j in groups[i]] for of in members]


def unmerge(tokens: Tensor, groups: Groups) -> Tensor:
    out = torch.empty(sum(map(len, groups)), tokens.shape[1])
    for token, members in zip(tokens, groups, strict=True):
        out[members] = token
    return out
