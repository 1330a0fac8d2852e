"""Token maps of videos and of several pictures, put together from those of their parts.

Across frames, a video is matched in clips of a few frames, in which the tokens of one place follow
one another in time: [h, w, frames] instead of [frames, h, w]. A clip is then a picture of h rows
of w·frames tokens, and one in each cell of neighbours in a row is a destination.
"""

import torch
from torch import Tensor

from tomesd.core.token_map import TokenMap, in_batch


def nothing_merged(x: Tensor) -> TokenMap:
    """The map of tokens [B, N, C] in which each stays alone."""
    none = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    return TokenMap.from_moves(x.shape[1], none, none)


def in_frames(token_map: TokenMap, frames: int) -> TokenMap:
    """A map [B·frames, N] of single frames as a map [B, frames·N] of videos."""
    # Frame after frame is how they lie in memory: what the rows are called does not change.
    return TokenMap(
        *(
            part.unflatten(0, (-1, frames)).flatten(1, 2)
            for part in (
                token_map.group_rows,
                token_map.head_rows,
                token_map.moved_rows,
                token_map.size,
            )
        )
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
    tokens = torch.arange(token_map.n, device=token_map.size.device)
    place = tokens % frames * n + tokens // frames  # Where each token goes.
    head, groups = place[token_map.head], token_map.group
    # Groups are numbered anew by their heads' places.
    is_head = torch.zeros_like(groups).scatter(1, head, 1)
    number = (is_head.cumsum(1) - 1).gather(1, head)
    group = groups.unflatten(1, (n, frames)).transpose(1, 2).flatten(1)
    joined = in_batch(number.gather(1, group.clamp(min=0)), token_map.m)
    return TokenMap(
        joined.masked_fill(group < 0, -1) if token_map.drops else joined,
        in_batch(torch.zeros_like(head).scatter(1, number, head), token_map.n),
        in_batch(place[token_map.moved], token_map.n),
        torch.zeros_like(token_map.size).scatter(1, number[..., None], token_map.size),
    )


def side_by_side(maps: list[TokenMap]) -> TokenMap:
    """The map of the first map's tokens, then the second's, and so on; none merge across."""
    all_n, all_m = sum(one.n for one in maps), sum(one.m for one in maps)
    n = m = 0
    group, head, moved = [], [], []
    for one in maps:
        # Of each sample's own tokens some came before, and all other maps' of the samples before.
        group.append(_moved_up(one.group_rows, m, all_m - one.m))
        head.append(_moved_up(one.head_rows, n, all_n - one.n))
        moved.append(_moved_up(one.moved_rows, n, all_n - one.n))
        n, m = n + one.n, m + one.m
    size = torch.cat([one.size for one in maps], dim=1)
    return TokenMap(torch.cat(group, 1), torch.cat(head, 1), torch.cat(moved, 1), size)


def _moved_up(rows: Tensor, by: int, for_each_sample: int) -> Tensor:
    """Dropped tokens stay dropped."""
    return torch.where(rows < 0, rows, in_batch(rows, for_each_sample) + by)
