"""The order of the merged tokens: other numbers for the groups of a token map."""

import torch
from torch import Tensor

from tomesd.core.partition import Partition
from tomesd.core.rows import in_batch, select_each
from tomesd.core.token_map import TokenMap


def renumbered(token_map: TokenMap, number: Tensor) -> TokenMap:
    """The same groups with other numbers.

    >>> pairs = TokenMap.from_groups([[0, 0, 1]])
    >>> renumbered(pairs, torch.tensor([[1, 0]])).group
    tensor([[1, 1, 0]])

    number: int64 [B, M], the new number of each group: a permutation.
    """
    new = in_batch(number, token_map.m)
    if token_map.drops:
        dropped = token_map.group_rows < 0
        group = select_each(new, token_map.group_rows.clamp(min=0)).masked_fill(dropped, -1)
    else:
        group = select_each(new, token_map.group_rows)
    head = number.scatter(1, number, token_map.head_rows)
    size = token_map.size.scatter(1, number[..., None], token_map.size)
    return TokenMap(group, head, token_map.moved_rows, size)


def destinations_last(token_map: TokenMap, partition: Partition) -> TokenMap:
    """The map whose groups are: protected tokens, unmerged sources, destinations.

    >>> sides = Partition(src=torch.tensor([0, 2]), dst=torch.tensor([1, 3]))
    >>> pairs = TokenMap.from_moves(4, moved=torch.tensor([[0]]), target=torch.tensor([[3]]))
    >>> destinations_last(pairs, sides).group
    tensor([[2, 1, 0, 2]])

    Each of the three keeps its order. partition: the one that the map was made with, in which
    protected tokens lead.
    Source: ToMe, Table 1e ("because we concatenate the sets afterward").
    """
    head = token_map.head
    tokens = torch.arange(token_map.n, device=head.device)
    is_dst = torch.zeros_like(tokens).index_fill(0, partition.dst, 1)[head]
    before = is_dst.cumsum(1)
    rank = torch.arange(token_map.m, device=head.device) - before
    others = token_map.m - partition.dst.shape[0]
    return renumbered(token_map, torch.where(is_dst > 0, before + (others - 1), rank))
