"""Sources, which may merge away, and destinations, which they may merge into.

A partition depends on shapes and settings only and is shared by all samples of a batch. A random
one is a pure function of a key, never of the global random state: it compiles, repeats, and is the
same for both halves of a guidance batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tomesd.core.rows import fixed


class Partition(NamedTuple):
    """Sources int64 [n_src] and destinations int64 [n_dst]; protected tokens are in neither."""

    src: Tensor
    dst: Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """A partition in windows: a source may merge into a destination of its own window only.

    order: int64 [windows, n_src + n_dst], the sources of each window, then its destinations; −1
    pads smaller windows. n_src: sources per window. padding: how many of all the sources are −1.
    """

    order: Tensor
    n_src: int
    padding: int

    @property
    def sides(self) -> tuple[int, int]:
        """How many sources and destinations a window has."""
        return self.n_src, fixed(self.order.shape[1]) - self.n_src

    @property
    def src(self) -> Tensor:
        return self.order[:, : self.n_src]

    @property
    def dst(self) -> Tensor:
        return self.order[:, self.n_src :]


def alternating(n: int, *, prefix: int = 0, device: torch.device | str | None = None) -> Partition:
    """Every other token is a source, as in ToMe's classifiers and its Appendix F.

    >>> alternating(5)
    Partition(src=tensor([0, 2, 4]), dst=tensor([1, 3]))

    prefix: how many leading tokens (class, distillation, registers, text) are protected. Evenness
    counts from the first token, protected or not, as in the paper.
    Raises ValueError if n < 0 or prefix is not from 0 to n.
    """
    _check(n, prefix)
    tokens = torch.arange(n, device=device)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    return Partition(tokens[even::2], tokens[odd::2])


def random(
    n: int,
    *,
    n_src: int | None = None,
    key: Tensor | None = None,
    prefix: int = 0,
    device: torch.device | str | None = None,
) -> Partition:
    """A random half (or `n_src`) of the tokens are sources (ToMe, Table 1e).

    >>> sorted(torch.cat(random(5, n_src=2)).tolist())
    [0, 1, 2, 3, 4]

    key: see `make_key`; None is make_key(seed=0).
    Raises ValueError if n < 0, or prefix or n_src is out of its range.
    """
    _check(n, prefix)
    free = n - prefix
    n_src = (free + 1) // 2 if n_src is None else n_src
    if not 0 <= n_src <= free:
        raise ValueError(f"n_src must be from 0 to {free}, got {n_src}")
    tokens = torch.arange(free, device=device)
    key = make_key(0) if key is None else key
    order = _hash(tokens + key.to(tokens.device)).argsort(stable=True) + prefix
    return Partition(order[:n_src], order[n_src:])


def strided(
    h: int,
    w: int,
    sy: int = 2,
    sx: int = 2,
    *,
    key: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Partition:
    """One destination in each cell of sy×sx tokens of an h×w grid; all others are sources.

    >>> strided(2, 4).dst
    tensor([0, 2])

    h, w: any size; where the stride does not divide it, the last cells are smaller.
    key: None takes each cell's top left token; with a key (see `make_key`) a random one.
    Raises ValueError if h, w, sy or sx is below 1.
    Source: Token Merging for Fast Stable Diffusion, section 3.
    """
    _check_grid(h, w, sy, sx)
    tops, lefts = torch.arange(0, h, sy, device=device), torch.arange(0, w, sx, device=device)
    y, x = tops[:, None], lefts[None, :]
    dy, dx = _chosen(y, x, h, w, sy, sx, key)
    dst = ((y + dy) * w + x + dx).flatten()
    is_src = torch.ones(h * w, dtype=torch.bool, device=device).index_fill(0, dst, False)
    # Without a host sync: the rank of a source among the sources is its position in the list.
    place = torch.where(is_src, is_src.cumsum(0) - 1, h * w - len(dst))
    tokens = torch.arange(h * w, device=device)
    src = tokens.new_zeros(h * w - len(dst) + 1).scatter(0, place, tokens)[:-1]
    return Partition(src, dst)


def windowed(
    h: int,
    w: int,
    sy: int = 2,
    sx: int = 2,
    window: int = 32,
    *,
    key: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Windows:
    """`strided` in windows: a source may merge into the destinations of its window only.

    >>> windowed(2, 4, window=2).dst
    tensor([[0],
            [2]])

    window: tokens along a side. A window holds as many whole cells as fit, at least one; if windows
        do not divide the grid, all of them shrink, to sizes as equal as possible.
    The number of comparisons grows with h·w instead of its square. Destinations are the same tokens
    as in `strided`.
    Raises ValueError if h, w, sy, sx or window is below 1.
    """
    _check_grid(h, w, sy, sx, window)
    high, wide = -(-h // sy), -(-w // sx)
    down, per_y = _even_split(high, max(1, window // sy))
    across, per_x = _even_split(wide, max(1, window // sx))
    rows = torch.arange(down * per_y, device=device).view(down, 1, per_y, 1) * sy
    columns = torch.arange(across * per_x, device=device).view(1, across, 1, per_x) * sx
    y, x = (place.expand(down, across, per_y, per_x).flatten(2) for place in (rows, columns))
    y, x = y.flatten(0, 1), x.flatten(0, 1)
    dy, dx = _chosen(y.clamp(max=h - 1), x.clamp(max=w - 1), h, w, sy, sx, key)
    dst = _token(y + dy, x + dx, h, w)
    # The positions in a cell in reading order, without the destination.
    others = torch.arange(sy * sx - 1, device=device)
    others = others + (others >= (dy * sx + dx)[..., None]).long()
    src = _token(y[..., None] + others // sx, x[..., None] + others % sx, h, w).flatten(1)
    padding = src.numel() - (h * w - high * wide)
    return Windows(torch.cat([src, dst], dim=1), src.shape[1], padding)


def _even_split(count: int, most: int) -> tuple[int, int]:
    """The fewest parts of at most `most` items, and the size of the largest of equal parts."""
    parts = -(-count // most)
    return parts, -(-count // parts)


def _token(y: Tensor, x: Tensor, h: int, w: int) -> Tensor:
    return torch.where((y < h) & (x < w), y * w + x, -1)


def _chosen(
    y: Tensor, x: Tensor, h: int, w: int, sy: int, sx: int, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The offset (dy, dx) of the destination in each cell; cells begin at y and x."""
    if key is None:
        zero = torch.zeros_like(y + x)
        return zero, zero
    bits = _hash((y // sy) * -(-w // sx) + x // sx + key.to(y.device))
    return bits % (h - y).clamp(max=sy), (bits >> 16) % (w - x).clamp(max=sx)


def make_key(seed: int, step: Tensor | float = 0, block: int = 0) -> Tensor:
    """The key of a random partition: the same for the same seed, denoising step and block.

    >>> bool(make_key(0, step=981) == make_key(0, step=torch.tensor(981)))
    True

    step: the timestep that the model is given: it identifies the step without a counter. A tensor
        stays on its device (the first value of a batch counts).
    Returns an int64 scalar tensor. No generator object and no host sync is involved.
    """
    step = torch.as_tensor(step).flatten()[:1].float()
    bits = step.view(torch.int32).long() & 0xFFFFFFFF
    return _hash(_hash(bits + 0x9E3779B9 * (block + 1)) + (seed & 0xFFFFFFFF))[0]


def _hash(x: Tensor) -> Tensor:
    """Scramble integers to 32 random-looking bits; no product overflows int64."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x045D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x


def _check_grid(h: int, w: int, sy: int, sx: int, window: int = 1) -> None:
    for name, value in (("h", h), ("w", w), ("sy", sy), ("sx", sx), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")


def _check(n: int, prefix: int) -> None:
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    if not 0 <= prefix <= n:
        raise ValueError(f"prefix must be from 0 to n={n}, got {prefix}")
