"""Token maps of videos and of several images, composed from the maps of their parts.

Across frames, a video is matched in clips of a few frames. The tokens of a clip are reordered so
that those at one position follow one another in time: [h, w, frames] instead of [frames, h, w]. A
clip is then matched like an image of h rows and w·frames columns.
"""

import torch
from torch import Tensor

from tomesd.core.rows import in_batch, is_exporting
from tomesd.core.token_map import TokenMap


def in_frames(token_map: TokenMap, frames: int) -> TokenMap:
    """A map [B·frames, N] of single frames as a map [B, frames·N] of videos."""
    if frames == 1:
        return token_map
    # Frames follow one another in memory, so the numbers of rows of the batch do not change.
    m, n = (token_map.m, token_map.n) if is_exporting() else (0, 0)
    return TokenMap(
        _joined(token_map.group_rows, frames, m),
        _joined(token_map.head_rows, frames, n),
        _joined(token_map.moved_rows, frames, n),
        _joined(token_map.size, frames, 0),
        None if token_map.first is None else _joined(token_map.first, frames, 0),
    )


def _joined(part: Tensor, frames: int, n: int) -> Tensor:
    """What is of single frames as of videos; rows by n more in each next frame, and −1 stays −1."""
    joined = part.view(part.shape[0] // frames, frames, *part.shape[1:])
    if n:
        shift = torch.arange(frames, device=part.device)[:, None] * n
        joined = torch.where(joined < 0, joined, joined + shift)
    return joined.flatten(1, 2)


def clips(frames: int, length: int) -> list[tuple[int, int]]:
    """Cut a video into clips of at least `length` frames, or a single one if it is shorter.

    Returns (clips, frames of each), longer ones first.

    >>> clips(13, length=4)
    [(1, 5), (2, 4)]
    """
    count = max(1, frames // length)
    short, longer = divmod(frames, count)
    return [cut for cut in ((longer, short + 1), (count - longer, short)) if cut[0]]


def time_last(x: Tensor, frames: int, w: int) -> Tensor:
    """Tokens [B, frames·h·w, C] in the order [h, w, frames]."""
    by_frame = x.view(x.shape[0], frames, -1, w, x.shape[2])
    return by_frame.permute(0, 2, 3, 1, 4).flatten(1, 3)


def time_first(token_map: TokenMap, frames: int) -> TokenMap:
    """A map of tokens in the order [h·w, frames] as a map of the order [frames, h·w]."""
    n = token_map.n // frames
    tokens = torch.arange(token_map.n, device=token_map.size.device)
    place = tokens % frames * n + tokens // frames
    head, groups = place[token_map.head], token_map.group
    # Groups are renumbered by the positions of their heads.
    is_head = torch.zeros_like(groups).scatter(1, head, 1)
    number = (is_head.cumsum(1) - 1).gather(1, head)
    group = groups.view(-1, n, frames).transpose(1, 2).flatten(1)
    joined = in_batch(number.gather(1, group.clamp(min=0)), token_map.m)
    return TokenMap(
        joined.masked_fill(group < 0, -1) if token_map.drops else joined,
        in_batch(torch.zeros_like(head).scatter(1, number, head), token_map.n),
        in_batch(place[token_map.moved], token_map.n),
        torch.zeros_like(token_map.size).scatter(1, number[..., None], token_map.size),
    )


def concatenate(maps: list[TokenMap]) -> TokenMap:
    """The map of several maps' tokens one after another; none merge across maps."""
    all_n, all_m = sum(one.n for one in maps), sum(one.m for one in maps)
    n = m = 0
    group, head, moved = [], [], []
    for one in maps:
        # A row moves by the other maps' tokens: those before it in its sample, and all of them in
        # each earlier sample.
        group.append(_shift(one.group_rows, m, all_m - one.m))
        head.append(_shift(one.head_rows, n, all_n - one.n))
        moved.append(_shift(one.moved_rows, n, all_n - one.n))
        n, m = n + one.n, m + one.m
    size = torch.cat([one.size for one in maps], dim=1)
    return TokenMap(torch.cat(group, 1), torch.cat(head, 1), torch.cat(moved, 1), size)


def _shift(rows: Tensor, by: int, per_sample: int) -> Tensor:
    """Rows by so many more, and by so many more again for each earlier sample; −1 stays −1."""
    return torch.where(rows < 0, rows, in_batch(rows, per_sample) + by)
