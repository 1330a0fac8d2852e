"""Token maps of videos and of several pictures, put together from those of their parts.

Across frames, a video is matched in clips of a few frames, in which the tokens of one place follow
one another in time: [h, w, frames] instead of [frames, h, w]. A clip is then a picture of h rows
of w·frames tokens, and one in each cell of neighbours in a row is a destination.
"""

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


def clips(frames: int, length: int) -> list[tuple[int, int]]:
    """How to cut a video into clips of at least `length` frames, one after another, or a single one
    if it is shorter: (clips, frames of each), longer ones first.

    >>> clips(13, length=4)
    [(1, 5), (2, 4)]
    """
    count = max(1, frames // length)
    short, longer = divmod(frames, count)
    return [cut for cut in ((longer, short + 1), (count - longer, short)) if cut[0]]


def place_by_place(x: Tensor, frames: int, w: int) -> Tensor:
    """Tokens [B, frames·h·w, C] in the order of `frame_by_frame`'s map: the frames of each place
    follow one another."""
    return x.unflatten(1, (frames, -1, w)).permute(0, 2, 3, 1, 4).flatten(1, 3)


def frame_by_frame(token_map: TokenMap, frames: int) -> TokenMap:
    """A map of a clip's tokens [h·w, frames] as a map of its tokens [frames, h·w]."""
    n = token_map.n // frames
    tokens = torch.arange(token_map.n, device=token_map.head.device)
    place = tokens % frames * n + tokens // frames  # Where each token goes.
    head = place[token_map.head]
    # Groups are numbered anew by their heads' places.
    is_head = torch.zeros_like(token_map.group).scatter(1, head, 1)
    number = (is_head.cumsum(1) - 1).gather(1, head)
    group = token_map.group.unflatten(1, (n, frames)).transpose(1, 2).flatten(1)
    joined = number.gather(1, group.clamp(min=0))
    return TokenMap(
        joined.masked_fill(group < 0, -1) if token_map.drops else joined,
        torch.zeros_like(head).scatter(1, number, head),
        place[token_map.moved],
        torch.zeros_like(token_map.size).scatter(1, number[..., None], token_map.size),
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
