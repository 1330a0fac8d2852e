"""What has an entry for each token, position tables and masks: merged tokens take their head's."""

import torch
from torch import Tensor

from tomesd.core.token_map import TokenMap


def head_entries(table: Tensor, token_map: TokenMap, dim: int) -> Tensor:
    """The entries of the heads, and all that come before the map's own tokens.

    dim: the dimension of tokens; 0 if the table is the same for all samples.
    """
    table = table.to(token_map.size.device)  # CogView4 makes its angles on the CPU.
    lead = table.shape[dim] - token_map.n
    if dim == 0:
        rows = token_map.head_rows[0] + lead
        return table.index_select(0, torch.cat([torch.arange(lead, device=rows.device), rows]))
    batch = token_map.size.shape[0]
    rows = (token_map.head + lead).view(
        batch, *(1,) * (dim - 1), -1, *(1,) * (table.dim() - dim - 1)
    )
    rows = rows.expand(-1, *table.shape[1:dim], -1, *table.shape[dim + 1 :])
    table = table.expand(batch, *table.shape[1:])
    return torch.cat([table.narrow(dim, 0, lead), table.gather(dim, rows)], dim=dim)


def mask_of_heads(mask: Tensor, token_map: TokenMap, beside: tuple[int, int]) -> Tensor:
    """A mask [B, ..., keys], or [B, ..., tokens, tokens] of all pairs, of the merged tokens.

    beside: how many other keys come before and after those of the map.
    """
    batch, (before, after) = token_map.size.shape[0], beside
    keys = torch.arange(mask.shape[-1], device=mask.device).expand(batch, -1)
    end = mask.shape[-1] - after
    keys = torch.cat([keys[:, :before], token_map.head + before, keys[:, end:]], dim=1)
    mask = mask.expand(batch, *mask.shape[1:])
    dims = (-1, -2) if mask.dim() > 2 and mask.shape[-2] == mask.shape[-1] > 1 else (-1,)
    for dim in dims:
        mask = mask.transpose(dim, -1)
        own = keys.view(batch, *(1,) * (mask.dim() - 2), -1).expand(-1, *mask.shape[1:-1], -1)
        mask = mask.gather(-1, own).transpose(dim, -1)
    return mask
