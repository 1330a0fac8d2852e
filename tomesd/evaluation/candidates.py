"""What the frontier compares: settings of this project, and ways to merge that are only measured.

The latter are settings with a token map of their own. Nothing of the product knows them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tomesd.evaluation.run import UNPATCHED, Row
from tomesd.patches.diffusers_unet import UNetPatch
from tomesd.settings import DiffusionSettings, diffusion_settings
from tomesd.token_map import TokenMap

PEER = "tomesd==0.1.3"


@dataclass(frozen=True)
class _Cells:
    """In a token map's place: one token for each cell of sy×sx, for keys and values alone."""

    h: int
    w: int
    sy: int
    sx: int
    pools: bool

    def merge(self, x: Tensor) -> Tensor:
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


def install(unet: Any, settings: DiffusionSettings) -> UNetPatch:
    """Let a UNet merge by these settings, of the product or of this file.

    >>> patch = install(pipe.unet, GridSettings(ratio=0.75, merge_block=False, merge_queries=False))
    >>> patch.remove()

    Raises what `apply_patch` raises.
    """
    settings = replace(settings)  # Another picture's maps stay with the other patch.
    patch = UNetPatch(unet, settings)
    if isinstance(settings, KeptSettings):
        patch.before(unet, settings.kept.begin)
    patch.install()
    return patch


@dataclass(frozen=True)
class Candidate(Row):
    """One point of the frontier; method is its name.

    >>> Candidate("blocks 0.5", DiffusionSettings(ratio=0.5), "whole blocks").name
    'blocks 0.5'

    family: what it is drawn as, one of FAMILIES.
    """

    family: str = UNPATCHED

    @property
    def name(self) -> str:
        return self.method

    @property
    def is_peer(self) -> bool:
        return self.family == PEER

    @property
    def is_setting(self) -> bool:
        """Whether `apply_patch` can do it."""
        return type(self.settings) is DiffusionSettings and not self.is_peer

    @property
    def period(self) -> int:
        """After how many forwards all that they do has been done once."""
        return self.settings.steps if isinstance(self.settings, KeptSettings) else 1

    @contextmanager
    def patched(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with this candidate's merging; a peer's pipeline is patched already."""
        if self.settings is None or self.is_peer:
            yield pipe
            return
        patch = install(pipe.unet, self.settings)
        try:
            yield pipe
        finally:
            patch.remove()


# In the order of the table and of the picture's legend.
FAMILIES = (
    UNPATCHED,
    "self-attention",
    "no log size",
    "keys and values",
    "whole blocks",
    "every branch (the paper)",
    "keys and values of a grid",
    "a map kept over steps",
    "random pruning",
    PEER,
)


def _of(family: str, **settings: DiffusionSettings) -> list[Candidate]:
    return [Candidate(name, chosen, family) for name, chosen in settings.items()]


# Branch by branch, or keys and values alone, at the finest level; all is said that differs.
_ATTENTION: dict[str, Any] = {"merge_block": False}
_KEYS: dict[str, Any] = {"merge_block": False, "merge_queries": False}
_BLOCKS: dict[str, Any] = {"merge_block": True}
_BY_4X4: dict[str, Any] = {"ratio": 0.9375, "sx": 4, "sy": 4}

# Levels are counted from the finest one (max_downsample), so that they are the same in models of
# different sizes: 1 is 1,024 tokens in the embedded pipeline and 4,096 in Stable Diffusion 1.5 at
# 512 px; 2 adds 256 and 1,024 tokens (min_tokens=256 and 1024); 8 is everywhere.
# Drawn: destinations at random (use_rand).
# Windows are in tokens: 32 is the whole grid of the embedded pipeline and a quarter of the other's,
# so that 16 does to its pictures what 32 does to the other's.
CANDIDATES: list[Candidate] = [
    Candidate(UNPATCHED),
    *_of(
        "self-attention",
        **{
            "attention 0.3": DiffusionSettings(ratio=0.3, **_ATTENTION),
            "attention 0.5": DiffusionSettings(ratio=0.5, **_ATTENTION),
            "attention 0.3, two levels": DiffusionSettings(
                ratio=0.3, max_downsample=2, **_ATTENTION
            ),
            "attention 0.5, two levels": DiffusionSettings(
                ratio=0.5, max_downsample=2, **_ATTENTION
            ),
            "attention 0.5, drawn": DiffusionSettings(ratio=0.5, use_rand=True, **_ATTENTION),
            "attention 0.5, no windows": DiffusionSettings(ratio=0.5, window=0, **_ATTENTION),
            "attention 0.5, windows of 16": DiffusionSettings(ratio=0.5, window=16, **_ATTENTION),
            "attention 0.5, windows of 8": DiffusionSettings(ratio=0.5, window=8, **_ATTENTION),
        },
    ),
    *_of(
        "no log size",
        **{
            "attention 0.3, no log size": DiffusionSettings(
                ratio=0.3, prop_attn=False, **_ATTENTION
            ),
            "attention 0.5, no log size": DiffusionSettings(
                ratio=0.5, prop_attn=False, **_ATTENTION
            ),
            "blocks 0.5, no log size": DiffusionSettings(ratio=0.5, prop_attn=False, **_BLOCKS),
        },
    ),
    *_of(
        "keys and values",
        **{
            "keys 0.5": DiffusionSettings(ratio=0.5, **_KEYS),
            "keys 0.75": DiffusionSettings(ratio=0.75, **_KEYS),
            "keys 0.9375": DiffusionSettings(**_BY_4X4, **_KEYS),
            "keys 0.75, two levels": DiffusionSettings(ratio=0.75, max_downsample=2, **_KEYS),
            "keys 0.9375, two levels": DiffusionSettings(max_downsample=2, **_BY_4X4, **_KEYS),
        },
    ),
    *_of(
        "whole blocks",
        **{
            f"blocks {ratio:g}{where}": DiffusionSettings(
                ratio=ratio, max_downsample=coarsest, **_BLOCKS
            )
            for ratio in (0.25, 0.5)
            for coarsest, where in ((1, ""), (2, ", two levels"), (8, ", all levels"))
        },
        **{
            f"blocks 0.5, windows of {window}": DiffusionSettings(
                ratio=0.5, window=window, **_BLOCKS
            )
            for window in (16, 8)
        },
        **{
            f"blocks {ratio:g}, drawn": DiffusionSettings(ratio=ratio, use_rand=True, **_BLOCKS)
            for ratio in (0.25, 0.5)
        },
    ),
    *_of("every branch (the paper)", **{"paper 0.5": diffusion_settings(0.5, "paper", {})}),
    *_of(
        "keys and values of a grid",
        **{
            "grid 2x2": GridSettings(ratio=0.75, **_KEYS),
            "grid 4x4": GridSettings(**_BY_4X4, **_KEYS),
            "grid 2x2, means": GridSettings(ratio=0.75, pools=True, **_KEYS),
            "grid 4x4, means": GridSettings(pools=True, **_BY_4X4, **_KEYS),
        },
    ),
    *_of(
        "a map kept over steps",
        **{
            f"{what} 0.5 kept {steps} steps": KeptSettings(ratio=0.5, steps=steps, **merging)
            for what, merging in (("attention", _ATTENTION), ("blocks", _BLOCKS))
            for steps in (2, 4)
        },
    ),
    *_of(
        "random pruning",
        **{
            "pruning 0.1": DiffusionSettings(ratio=0.1, method="prune", **_ATTENTION),
            "pruning 0.5": DiffusionSettings(ratio=0.5, method="prune", **_ATTENTION),
            "pruning of blocks 0.5": DiffusionSettings(ratio=0.5, method="prune", **_BLOCKS),
        },
    ),
    # As it is after installation: destinations at random.
    *_of(
        PEER,
        **{
            f"{PEER} {ratio:g}": DiffusionSettings(ratio=ratio, use_rand=True, **_ATTENTION)
            for ratio in (0.3, 0.5)
        },
    ),
]


def chosen(names: list[str] | None, with_peer: bool) -> list[Candidate]:
    """The candidates with these names, or all; the unpatched model is always the first.

    >>> [candidate.name for candidate in chosen(["keys 0.5"], with_peer=False)]
    ['unpatched', 'keys 0.5']

    Raises ValueError for a name that none has.
    """
    known = [each for each in CANDIDATES if with_peer or not each.is_peer]
    for name in names or ():
        if name not in [each.name for each in known]:
            allowed = "; ".join(each.name for each in known)
            raise ValueError(f"only must be among: {allowed}; got {name!r}")
    return [each for each in known if not names or each.name in names or each.family == UNPATCHED]
