"""Token maps of several sequences that are packed into one, and of sequences with a tail."""

from collections.abc import Sequence

import torch

from tomesd.core.rows import fixed, in_batch
from tomesd.core.token_map import TokenMap


def packed(maps: Sequence[TokenMap]) -> TokenMap:
    """One map of one sample that does what all of these do, sample after sample.

    >>> pairs, apart = TokenMap.from_groups([[0, 0, 1]]), TokenMap.from_groups([[0, 1]])
    >>> packed([pairs, apart]).group
    tensor([[0, 0, 1, 2, 3]])

    maps: of any numbers of samples and tokens; none of them drops tokens.
    Returns the map of [1, N], N being the tokens of all samples of all maps.
    """
    groups, heads, moved, sizes = [], [], [], []
    tokens = tokens_left = 0
    for each in maps:
        batch = fixed(each.size.shape[0])
        sample = torch.arange(batch, device=each.size.device)[:, None]
        groups.append((each.group + (sample * each.m + tokens_left)).flatten())
        heads.append((each.head + (sample * each.n + tokens)).flatten())
        moved.append((each.moved + (sample * each.n + tokens)).flatten())
        sizes.append(each.size.flatten())
        tokens, tokens_left = tokens + batch * each.n, tokens_left + batch * each.m
    group, head, moved_tokens = (torch.cat(parts)[None] for parts in (groups, heads, moved))
    return TokenMap(group, head, moved_tokens, torch.cat(sizes)[None, :, None])


def with_tail(token_map: TokenMap, count: int) -> TokenMap:
    """The map that does the same, and leaves so many tokens after these as they are.

    >>> with_tail(TokenMap.from_groups([[0, 0, 1]]), 2).group
    tensor([[0, 0, 1, 2, 3]])

    token_map: drops no tokens.
    """
    n, m, size = token_map.n, token_map.m, token_map.size
    tail = torch.arange(count, device=size.device).expand(size.shape[0], -1)
    return TokenMap(
        in_batch(torch.cat([token_map.group, tail + m], 1), m + count),
        in_batch(torch.cat([token_map.head, tail + n], 1), n + count),
        in_batch(token_map.moved, n + count),
        torch.cat([size, size.new_ones(size.shape[0], count, 1)], 1),
    )
