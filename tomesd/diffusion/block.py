"""What one block of a denoiser merges, and the forward pass that it is in."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tomesd import kernels
from tomesd.core.token_map import TokenMap

# Frames, height and width of the tokens of one image or video; several may follow one another.
Grid = tuple[int, int, int]

# The key under which a block finds its Place in a dict among its arguments.
_PLACE = "tomesd_place"


class Place(NamedTuple):
    """The forward pass that a block is in. It travels among the block's own arguments, because
    gradient checkpointing calls a block again when other forward passes may have come in between.
    """

    grids: tuple[Grid, ...]
    timestep: Any = 0
    stage: int = 0

    def add_to(self, carrier: dict[str, Any] | None) -> dict[str, Any]:
        """A dict of the host's arguments with this place in it."""
        return (carrier or {}) | {_PLACE: self}


def pop_place(given: dict[str, Any], carrier: str) -> Place | None:
    """Take the place out of a block's arguments, which are then as the host made them.

    None if there is none: another model, which shares the block, is calling it.
    """
    held = given.get(carrier)
    place: Place | None = None
    if isinstance(held, dict):
        given[carrier] = dict(held)
        place = given[carrier].pop(_PLACE, None)
    elif isinstance(held, tuple) and held and isinstance(held[-1], Place):
        *tables, place = held
        given[carrier] = tuple(tables)
    return place


@dataclass(eq=False)
class ThreadState:
    """What one thread is doing in one model, or in one transformer of a UNet.

    stage, timestep, grids, place: of the forward pass; grids only until it begins, where a hook
        reads them from its data.
    inside: whether that is running.
    map, x, merged, bias, keys: of the block that is running: its token map or None where nothing
        merges, its tokens before and after merging where all of it runs on merged tokens, log(size)
        of its keys, and the tokens from which attention projects them, where they are unmerged
        because others compute it.
    """

    stage: int = 0
    timestep: Any = 0
    grids: tuple[Grid, ...] | None = None
    place: Place | None = None
    inside: bool = False
    map: TokenMap | None = None
    x: Tensor | None = None
    merged: Tensor | None = None
    bias: Tensor | None = None
    keys: Tensor | None = None

    def merge_block(self, x: Tensor, token_map: TokenMap) -> Tensor:
        """Let a whole block run on merged tokens."""
        self.map, self.x, self.merged = token_map, x, token_map.merge(x)
        return self.merged

    def leave_block(self) -> tuple[TokenMap, Tensor, Tensor] | None:
        """Forget the block: its map, x and merged, or None if it did not merge as a whole."""
        token_map, x, merged = self.map, self.x, self.merged
        self.map = self.x = self.merged = self.bias = self.keys = None
        return None if token_map is None or x is None or merged is None else (token_map, x, merged)


def add_residual(token_map: TokenMap, x: Tensor, merged: Tensor, y: Tensor) -> Tensor:
    """x + unmerge(y − merged): what a block added to the merged tokens is added to all tokens."""
    if kernels.usable(x, y, merged):
        return kernels.add_residual(x, y, merged, token_map)
    # Into the unmerged copy, so that no more memory is kept than in the unpatched block.
    return token_map.unmerge(y - merged).add_(x)
