"""Token maps of videos and of several pictures, put together from those of their parts."""

import torch
from torch import Tensor

from tomesd.token_map import TokenMap


def nothing_merged(x: Tensor) -> TokenMap:
    """The map of tokens [B, N, C] in which each stays alone."""
    none = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    return TokenMap.from_moves(x.shape[1], none, none)


def in_frames(token_map: TokenMap, frames: int) -> TokenMap:
    """A map [B·frames, N] of single frames as a map [B, frames·N] of videos."""
    if frames == 1:
        return token_map

    def joined(index: Tensor, step: int) -> Tensor:
        first = torch.arange(0, frames * step, step, device=index.device)
        return _moved_up(index.unflatten(0, (-1, frames)), first[:, None]).flatten(1)

    return TokenMap(
        joined(token_map.group, token_map.m),
        joined(token_map.head, token_map.n),
        joined(token_map.moved, token_map.n),
        token_map.size.unflatten(0, (-1, frames)).flatten(1, 2),
    )


def side_by_side(maps: list[TokenMap]) -> TokenMap:
    """The map of the first map's tokens, then the second's, and so on; none merge across."""
    n = m = 0
    group, head, moved = [], [], []
    for token_map in maps:
        group.append(_moved_up(token_map.group, m))
        head.append(token_map.head + n)
        moved.append(token_map.moved + n)
        n, m = n + token_map.n, m + token_map.m
    size = torch.cat([token_map.size for token_map in maps], dim=1)
    return TokenMap(torch.cat(group, 1), torch.cat(head, 1), torch.cat(moved, 1), size)


def _moved_up(index: Tensor, by: Tensor | int) -> Tensor:
    """Dropped tokens stay dropped."""
    return torch.where(index < 0, index, index + by)
