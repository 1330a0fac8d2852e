"""Ways to merge that are only measured: settings with a token map, or a time, of their own.

Nothing of the product knows them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tomesd.core.token_map import TokenMap
from tomesd.diffusion.ratio_schedule import RatioPlan, RatioSchedule
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.patch import UNetPatch


@dataclass(frozen=True)
class _Cells:
    """In a token map's place: one token for each cell of sy×sx, for keys and values alone."""

    h: int
    w: int
    sy: int
    sx: int
    pools: bool

    def merge(self, x: Tensor, how: str = "mean") -> Tensor:
        if not self.pools:
            return x.unflatten(1, (self.h, self.w))[:, :: self.sy, :: self.sx].flatten(1, 2)
        picture = x.transpose(1, 2).unflatten(2, (self.h, self.w))
        # The last cells are smaller where the stride does not divide the grid.
        means = F.avg_pool2d(picture, (self.sy, self.sx), ceil_mode=True, count_include_pad=False)
        return means.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class GridSettings(DiffusionSettings):
    """Keys and values from a grid, whatever they look like: one token for each cell of sy×sx.

    >>> GridSettings(ratio=0.75, merge_block=False, merge_queries=False).merged(32, 32)
    768

    pools: False takes the top left token of each cell, as nearest-neighbour downsampling does; True
        the mean of its tokens.
    Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution
    Images" (2024).
    """

    pools: bool = False

    @property
    def weighs_keys(self) -> bool:
        return False  # Cells are all of one size.

    @property
    def combine(self) -> str:
        return "mean"

    def merged(self, h: int, w: int) -> int:
        return h * w - -(-h // self.sy) * -(-w // self.sx)

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> Any:
        return _Cells(h, w, self.sy, self.sx, self.pools)


@dataclass(eq=False)
class _Kept:
    """The maps of all blocks, in the order in which they run, and for how long they are good."""

    steps: int
    maps: list[TokenMap] = field(default_factory=list)
    step: int = 0
    block: int = 0
    timestep: float = -1.0

    def begin(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each denoising step. A timestep that rises begins another picture."""
        timestep = float(args[1] if len(args) > 1 else kwargs["timestep"])
        self.step = 0 if timestep > self.timestep else self.step + 1
        self.timestep, self.block = timestep, 0
        if self.step % self.steps == 0:
            self.maps.clear()

    def next(self, make: Callable[[], TokenMap]) -> TokenMap:
        if len(self.maps) == self.block:
            self.maps.append(make())
        self.block += 1
        return self.maps[self.block - 1]


@dataclass(frozen=True)
class KeptSettings(DiffusionSettings):
    """Each block keeps its token map over so many denoising steps of a picture.

    >>> KeptSettings(ratio=0.5, steps=4)

    To measure what that would bring: it has a memory, so one model alone may run with it, eagerly,
    and it wants `install`.
    """

    steps: int = 2

    @cached_property
    def kept(self) -> _Kept:
        return _Kept(self.steps)

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> TokenMap:
        make = super().token_map
        return self.kept.next(lambda: make(features, h, w, key))


@dataclass(eq=False)
class _Shared:
    """The map of the run of blocks that is under way."""

    map: TokenMap | None = None

    def begin(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.map = None


@dataclass(frozen=True)
class RunSettings(DiffusionSettings):
    """The blocks of a transformer, one right after another, share the map of the first.

    >>> RunSettings(ratio=0.5)

    The same as one merge around the whole run as a residual: what a block adds is the same for all
    tokens of a group, so merging its output gives the next block what this one gave, without the
    merge and unmerge between them. It saves the matching. Like `KeptSettings` it wants `install`.
    """

    @cached_property
    def shared(self) -> _Shared:
        return _Shared()

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> TokenMap:
        if self.shared.map is None:
            self.shared.map = super().token_map(features, h, w, key)
        return self.shared.map


MATCHED_ON = ("bfloat16", "a quarter of the channels", "the mean of both guidance halves")


@dataclass(frozen=True)
class MatchedSettings(DiffusionSettings):
    """Similarity from less than the block's input, one of MATCHED_ON.

    >>> MatchedSettings(ratio=0.5, on="bfloat16")

    With the mean of both halves of a guidance batch, both get one map.
    """

    on: str = "bfloat16"

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> TokenMap:
        make = super().token_map
        if self.on == "bfloat16":
            return make(features.to(torch.bfloat16), h, w, key)
        if self.on == "a quarter of the channels":
            return make(features[..., ::4].contiguous(), h, w, key)
        return make(features.unflatten(0, (2, -1)).mean(0), h, w, key).repeat(2)


@dataclass(frozen=True)
class LateSettings(DiffusionSettings):
    """Merge in all but the first steps, as `RatioSchedule.last` does.

    >>> LateSettings(ratio=0.5, since=0.2)

    since: the share of the steps that stay as they are.
    """

    since: float = 0.2

    @property
    def steady(self) -> DiffusionSettings:
        """The settings of the steps that merge."""
        values = asdict(self)
        return DiffusionSettings(**{each.name: values[each.name] for each in _FIELDS})

    def over_steps(self, unpatched: float, merged: float) -> float:
        """The mean over all steps of what is so much in a step without and with merging."""
        return self.since * unpatched + (1 - self.since) * merged


_FIELDS = fields(DiffusionSettings)


def install(unet: Any, settings: DiffusionSettings, pipe: Any = None) -> UNetPatch:
    """Let a UNet merge by these settings, of the product or of this file.

    >>> patch = install(pipe.unet, GridSettings(ratio=0.75, merge_block=False, merge_queries=False))
    >>> patch.remove()

    pipe: the pipeline whose scheduler tells the steps; `LateSettings` want it.
    Raises what `apply_patch` raises.
    """
    plan = None
    if isinstance(settings, LateSettings):
        plan = RatioPlan(RatioSchedule.last(settings.ratio, settings.since), pipe)
        settings = settings.steady
    settings = replace(settings)  # Another picture's maps stay with the other patch.
    patch = UNetPatch(unet, settings, plan)
    if isinstance(settings, KeptSettings):
        patch.before(unet, settings.kept.begin)
    if isinstance(settings, RunSettings):
        for found in patch.transformers:
            patch.before(found.module, settings.shared.begin)
    patch.install()
    return patch
