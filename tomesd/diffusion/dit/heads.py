"""What has an entry for each token, position tables and masks: merged tokens take their head's."""

from typing import Any

import torch
from torch import Tensor

from tomesd.core.rows import fixed
from tomesd.core.token_map import TokenMap


def head_entries(table: Tensor, token_map: TokenMap, dim: int, first: bool = True) -> Tensor:
    """The entries of the heads, and all that are not of the map's own tokens.

    dim: the dimension of tokens; 0 if the table is the same for all samples.
    first: whether the others come before.
    """
    table = table.to(token_map.size.device)  # CogView4 makes its angles on the CPU.
    length = fixed(table.shape[dim])
    others = length - token_map.n
    lead = others if first else 0
    if dim == 0:
        rows = token_map.head_rows[0] + lead
        places = torch.arange(length, device=rows.device)
        return table.index_select(0, torch.cat([places[:lead], rows, places[lead + token_map.n :]]))
    batch = token_map.size.shape[0]
    rows = (token_map.head + lead).view(
        batch, *(1,) * (dim - 1), -1, *(1,) * (table.dim() - dim - 1)
    )
    rows = rows.expand(-1, *table.shape[1:dim], -1, *table.shape[dim + 1 :])
    table = table.expand(batch, *table.shape[1:])
    before = table.narrow(dim, 0, lead)
    after = table.narrow(dim, lead + token_map.n, others - lead)
    return torch.cat([before, table.gather(dim, rows), after], dim=dim)


def tables_of_heads(tables: Any, token_map: TokenMap, dim: int, first: bool) -> Any:
    """`head_entries` of a table, or of each in a dict or tuple; dim may be -1, as in `Rotary`."""
    if isinstance(tables, dict):
        return {key: tables_of_heads(each, token_map, dim, first) for key, each in tables.items()}
    if not isinstance(tables, Tensor):
        return tuple(tables_of_heads(each, token_map, dim, first) for each in tables)
    dim = dim if dim >= 0 else 1 + (tables.shape[1] == 1)
    return head_entries(tables, token_map, dim, first)


def own_entries(value: Tensor, token_map: TokenMap, dim: int) -> Tensor:
    """Those of the heads, if there is an entry for each token."""
    own = value.dim() > dim and value.shape[dim] == token_map.n
    return head_entries(value, token_map, dim) if own else value


def mask_of_heads(mask: Tensor, token_map: TokenMap, beside: tuple[int, int]) -> Tensor:
    """A mask [B, ..., keys], or [B, ..., tokens, tokens] of all pairs, of the merged tokens.

    beside: how many other keys come before and after those of the map.
    """
    batch, (before, after) = token_map.size.shape[0], beside
    length = fixed(mask.shape[-1])
    keys = torch.arange(length, device=mask.device).expand(batch, -1)
    end = length - after
    keys = torch.cat([keys[:, :before], token_map.head + before, keys[:, end:]], dim=1)
    mask = mask.expand(batch, *mask.shape[1:])
    dims = (-1, -2) if mask.dim() > 2 and mask.shape[-2] == mask.shape[-1] > 1 else (-1,)
    for dim in dims:
        mask = mask.transpose(dim, -1)
        own = keys.view(batch, *(1,) * (mask.dim() - 2), -1).expand(-1, *mask.shape[1:-1], -1)
        mask = mask.gather(-1, own).transpose(dim, -1)
    return mask


def first_samples(token_map: TokenMap, count: int) -> TokenMap:
    """The map of the first samples of the batch."""
    if count == token_map.size.shape[0]:
        return token_map
    first = token_map.first
    return TokenMap(
        token_map.group_rows[:count],
        token_map.head_rows[:count],
        token_map.moved_rows[:count],
        token_map.size[:count],
        None if first is None else first[:count],
    )
