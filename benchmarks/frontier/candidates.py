"""The candidates of the frontier: settings of this project, a plain grid, pruning, and the peer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.caches.known import UNET_CACHES, Apply, repeat
from benchmarks.frontier.matchers import GridMatcher, PoolingGridMatcher
from benchmarks.pictures.picture_set import UNPATCHED, Method
from tomesd import RatioSchedule
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.ratio_schedule import LateSchedule
from tomesd.diffusion.settings import PRESETS, DiffusionSettings, diffusion_settings
from tomesd.diffusion.unet import UNet, UNetPatch

# dbolya's package, the known implementation.
PEER = "tomesd==0.1.3"
LATE = "late: unpatched in the first fifth of the steps"
CACHE = "a cache"
BOTH = "a cache, and late merging"

# In the order of the table and of the plot's legend.
FAMILIES = (
    UNPATCHED,
    "self-attention",
    "no proportional attention",
    "plain means",
    "keys and values",
    "refined by k-means",
    "whole blocks",
    LATE,
    "every branch (the paper)",
    "grid of keys and values (ToDo)",
    "random pruning",
    PEER,
    CACHE,
    BOTH,
)


@dataclass(frozen=True)
class Candidate(Method):
    """One point of the frontier; method is its name.

    >>> Candidate("blocks 0.5", DiffusionSettings(ratio=0.5), "whole blocks").name
    'blocks 0.5'

    family: one of FAMILIES. matcher: one that is only measured; None for the library's.
    cache: computes every `cycle`-th step, but all steps of a share `whole`. timed_steps: of an
        image in which it does so from the first step on.
    """

    family: str = UNPATCHED
    matcher: type[Matcher] | None = None
    cache: Apply | None = None
    cycle: int = 1
    whole: float = 0.0
    timed_steps: int = 0

    @property
    def name(self) -> str:
        return self.method

    @property
    def merging(self) -> dict[str, Any] | None:
        merging = super().merging
        return merging if self.cache is None else {"cache": self.name, **(merging or {})}

    @property
    def is_peer(self) -> bool:
        return self.family == PEER

    @property
    def schedule(self) -> RatioSchedule | None:
        """How the ratio changes over the steps; None if it does not."""
        ratio = self.ratio
        return ratio if isinstance(ratio, RatioSchedule) else None

    @property
    def is_steady_setting(self) -> bool:
        """Whether `apply_patch` supports it, with the same ratio in every step."""
        return not (
            self.settings is None
            or self.is_peer
            or self.matcher
            or self.cache
            or self.schedule is not None
        )

    @property
    def shipped_as(self) -> str:
        """The name of these settings for `apply_patch` where all levels pay: "default", of
        pipelines, a preset, or "" for others."""
        for preset in PRESETS if not (self.is_peer or self.matcher or self.cache) else ():
            chosen = diffusion_settings(0.5, preset, {})
            if self.settings == replace(chosen, only_where_it_pays=False):
                return "default" if preset == "late" else f"preset {preset}"
        return ""

    @property
    def steady(self) -> "Candidate":
        """The candidate that is timed for this one: of a schedule, its steps that merge. A cache is
        timed itself, over a cycle."""
        if self.schedule is None or self.cache is not None:
            return self
        ratio = max(ratio for _, ratio in self.schedule.pieces)
        assert self.settings is not None
        settings = replace(self.settings, ratio=ratio)
        return next(each for each in CANDIDATES if each.settings == settings and not each.matcher)

    def over_steps(self, unpatched: float, merged: float) -> float:
        """The mean over all steps of a quantity of one step without and with merging; for a cache,
        merged is the mean of its cycle."""
        if self.cache is not None:
            return self.whole * unpatched + (1 - self.whole) * merged
        if self.schedule is None:
            return merged
        start, total = 0.0, 0.0
        for until, ratio in self.schedule.pieces:
            total += (until - start) * (merged if ratio else unpatched)
            start = until
        return total

    def patch(self, unet: Any, pipe: Any = None) -> UNetPatch:
        """This candidate's patch of a UNet, not installed yet. pipe: counts a schedule's steps."""
        settings = self.settings or DiffusionSettings(ratio=0)
        matcher = self.matcher(settings) if self.matcher else None
        return UNetPatch(UNet(), unet, settings, pipe, matcher)

    @contextmanager
    def patched(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with this candidate's merging; the peer's pipeline is patched already."""
        if self.settings is None or self.is_peer:
            yield pipe
            return
        patch = self.patch(pipe.unet, pipe)
        patch.install()
        try:
            with self.cache(pipe, pipe.unet) if self.cache else nullcontext():
                yield pipe
        finally:
            patch.remove()


def _family(name: str, **settings: DiffusionSettings) -> list[Candidate]:
    return [Candidate(method, each, name) for method, each in settings.items()]


def _attention(ratio: float, **options: Any) -> DiffusionSettings:
    return DiffusionSettings(ratio=ratio, merge_block=False, **options)


def _keys(ratio: Any, **options: Any) -> DiffusionSettings:
    """Keys and values alone; above 0.75, one destination in each cell of 4×4."""
    largest = ratio.pieces[-1][1] if isinstance(ratio, RatioSchedule) else ratio
    if largest > 0.75:
        options = {"sx": 4, "sy": 4} | options
    return DiffusionSettings(ratio=ratio, merge_block=False, merge_queries=False, **options)


def _blocks(ratio: Any, **options: Any) -> DiffusionSettings:
    return DiffusionSettings(ratio=ratio, **options)


def _late(ratio: float) -> Any:
    return LateSchedule.of_ratio(ratio)


def _caches(family: str, settings: DiffusionSettings) -> list[Candidate]:
    """Caches, with merging in the steps that they compute. Those of diffusers keep what blocks give
    for the tokens of one step, and do not go with blocks that merge others in the next one."""
    ending = ", blocks 0.5, all levels, late" if family == BOTH else ""
    found = {
        f"repeat {interval - 1} of {interval}": (repeat(interval), interval, 0.2, interval)
        for interval in (2, 3)
    }
    # Pyramid attention broadcast computes all steps that are not from 100 to 800, and TaylorSeer
    # the first 3 of 25.
    whole = {"DeepCache": 0.0, "pyramid attention broadcast": 0.3, "TaylorSeer": 0.12}
    for name, apply in UNET_CACHES.items():
        kind, _, interval = name.rpartition(" ")
        if family == CACHE or kind == "DeepCache":
            found[name] = apply, int(interval), whole[kind], 10**6
    return [
        Candidate(f"{name}{ending}", settings, family, None, *how) for name, how in found.items()
    ]


# Levels are counted from the finest one (max_downsample), so that they are the same in models of
# different sizes: 1 is 1,024 tokens in the embedded pipeline and 4,096 in Stable Diffusion 1.5 at
# 512 px; 2 adds 256 and 1,024 tokens; 8 is every level. Drawn: random destinations (use_rand).
# Windows are in tokens: 32 is the whole grid of the embedded pipeline and a quarter of the other's,
# so 16 does to its pictures what 32 does to the other's.
CANDIDATES: list[Candidate] = [
    Candidate(UNPATCHED),
    *_family(
        "self-attention",
        **{
            "attention 0.3": _attention(0.3),
            "attention 0.5": _attention(0.5),
            "attention 0.3, two levels": _attention(0.3, max_downsample=2),
            "attention 0.5, two levels": _attention(0.5, max_downsample=2),
            "attention 0.5, drawn": _attention(0.5, use_rand=True),
            "attention 0.5, no windows": _attention(0.5, window=0),
            "attention 0.5, windows of 16": _attention(0.5, window=16),
            "attention 0.5, windows of 8": _attention(0.5, window=8),
        },
    ),
    *_family(
        "no proportional attention",
        **{
            "attention 0.3, no log size": _attention(0.3, prop_attn=False),
            "attention 0.5, no log size": _attention(0.5, prop_attn=False),
            "blocks 0.5, no log size": _blocks(0.5, prop_attn=False),
        },
    ),
    *_family(
        "plain means",
        **{
            "attention 0.5, plain means": _attention(0.5, keep_norm=False),
            "keys 0.5, plain means": _keys(0.5, keep_norm=False),
            "keys 0.75, plain means": _keys(0.75, keep_norm=False),
            "keys 0.9375, plain means": _keys(0.9375, keep_norm=False),
        },
    ),
    *_family(
        "keys and values",
        **{
            "keys 0.5": _keys(0.5),
            "keys 0.75": _keys(0.75),
            "keys 0.9375": _keys(0.9375),
            "keys 0.75, two levels": _keys(0.75, max_downsample=2),
            "keys 0.9375, two levels": _keys(0.9375, max_downsample=2),
        },
    ),
    *_family(
        "refined by k-means",
        **{
            "keys 0.5, refined": _keys(0.5, refine=1),
            "keys 0.75, refined": _keys(0.75, refine=1),
            "keys 0.9375, refined": _keys(0.9375, refine=1),
            "keys 0.9375, refined twice": _keys(0.9375, refine=2),
            "keys 0.9375, refined twice, drawn": _keys(0.9375, refine=2, use_rand=True),
            "attention 0.5, refined": _attention(0.5, refine=1),
            "attention 0.5, refined, drawn": _attention(0.5, refine=1, use_rand=True),
            "blocks 0.5, refined": _blocks(0.5, refine=1),
            "blocks 0.75, refined": _blocks(0.75, refine=1),
        },
    ),
    *_family(
        "whole blocks",
        **{
            f"blocks {ratio:g}{where}": _blocks(ratio, max_downsample=coarsest)
            for ratio in (0.25, 0.5)
            for coarsest, where in ((1, ""), (2, ", two levels"), (8, ", all levels"))
        },
        **{
            "blocks 0.5, windows of 16": _blocks(0.5, window=16),
            "blocks 0.5, windows of 8": _blocks(0.5, window=8),
            "blocks 0.75": _blocks(0.75),
            "blocks 0.25, drawn": _blocks(0.25, use_rand=True),
            "blocks 0.5, drawn": _blocks(0.5, use_rand=True),
        },
    ),
    *_family(
        LATE,
        **{
            "keys 0.9375, late": _keys(_late(0.9375)),
            "blocks 0.5, late": _blocks(_late(0.5)),
            "blocks 0.5, two levels, late": _blocks(_late(0.5), max_downsample=2),
            "blocks 0.5, all levels, late": _blocks(_late(0.5), max_downsample=8),
            "blocks 0.75, late": _blocks(_late(0.75)),
        },
    ),
    *_family("every branch (the paper)", **{"paper 0.5": diffusion_settings(0.5, "paper", {})}),
    *(
        Candidate(name, _keys(ratio), "grid of keys and values (ToDo)", matcher)
        for name, ratio, matcher in (
            ("grid 2x2", 0.75, GridMatcher),
            ("grid 4x4", 0.9375, GridMatcher),
            ("grid 2x2, means", 0.75, PoolingGridMatcher),
            ("grid 4x4, means", 0.9375, PoolingGridMatcher),
        )
    ),
    *_family(
        "random pruning",
        **{
            "pruning 0.1": _attention(0.1, method="prune"),
            "pruning 0.5": _attention(0.5, method="prune"),
            "pruning of blocks 0.5": _blocks(0.5, method="prune"),
        },
    ),
    *_caches(CACHE, _blocks(0.0)),
    *_caches(BOTH, _blocks(_late(0.5), max_downsample=8)),
    # With its defaults: random destinations.
    *_family(
        PEER, **{f"{PEER} {ratio:g}": _attention(ratio, use_rand=True) for ratio in (0.3, 0.5)}
    ),
]


def chosen(names: list[str] | None, with_peer: bool) -> list[Candidate]:
    """The candidates with these names, or all. The unpatched model is always the first, and a
    schedule's steady candidate is added.

    >>> [candidate.name for candidate in chosen(["keys 0.5"], with_peer=False)]
    ['unpatched', 'keys 0.5']

    Raises ValueError for an unknown name.
    """
    known = [each for each in CANDIDATES if with_peer or not each.is_peer]
    for name in names or ():
        if name not in [each.name for each in known]:
            allowed = "; ".join(each.name for each in known)
            raise ValueError(f"only must be among: {allowed}; got {name!r}")
    if not names:
        return known
    wanted = {UNPATCHED, *names, *(each.steady.name for each in known if each.name in names)}
    return [each for each in known if each.name in wanted]
