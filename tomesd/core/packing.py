"""Token maps of several sequences that are packed into one."""

from collections.abc import Sequence

import torch

from tomesd.core.rows import fixed
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
    return TokenMap(
        *(torch.cat(parts)[None] for parts in (groups, heads, moved)),
        torch.cat(sizes)[None, :, None],
    )
