"""The recipes of scripts/steps.py: merging, a cache, or both, at a given share of the work."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

import tomesd
from benchmarks.caches.known import Apply
from benchmarks.caches.repeat import repeated, spread, whole_steps
from tomesd import RatioSchedule
from tomesd.calibration import Curves, greedy

WORK = (0.4, 0.6, 0.8)
CALIBRATED_WORK = (0.6, 0.8)
# The largest ratio of 2×2 cells.
_LARGEST = 0.75


@dataclass(frozen=True)
class Recipe:
    """One way to save work in an image of some steps.

    name: "merge", "merge late", "cache" or "both", at a share of the work; or a fixed setting.
    merging: the arguments of `apply_patch`; None leaves the model unpatched. cache: None computes
    all steps.
    """

    name: str
    merging: Mapping[str, Any] | None = None
    cache: Apply | None = None

    @contextmanager
    def applied(self, pipe: Any, denoiser: Any) -> Iterator[None]:
        with ExitStack() as stack:
            if self.merging is not None:
                stack.enter_context(tomesd.patched(pipe, **self.merging))
            if self.cache is not None:
                stack.enter_context(self.cache(pipe, denoiser))
            yield


def recipes(
    steps: int, ratio_for: "RatioForWork", caches: Mapping[str, Apply] = MappingProxyType({})
) -> list[Recipe]:
    """All recipes for an image of this many steps: those at each share of WORK that can be reached,
    and fixed settings.

    >>> [recipe.name for recipe in recipes(1, ratio_for)][:3]
    ['default', 'steady', 'merge 0.4']

    caches: others that are measured as they are, and DeepCache with merging late on top.

    merge: whole blocks on all levels, in all steps. late: not in the first fifth of the steps, at
    least one. cache: repeats what the blocks added in some steps. both: merging late, in the steps
    that a cache computes.
    """
    first = whole_steps(steps)
    found = [
        Recipe("default", {"ratio": 0.5}),
        Recipe("steady", {"ratio": 0.5, "preset": "steady"}),
    ]
    for work in WORK:
        found.append(_merging(f"merge {work:g}", ratio_for(work)))
        left = (work * steps - first) / (steps - first) if steps > first else 0
        late = _merging(f"merge late {work:g}", ratio_for(left))
        found.append(_late_recipe(late, steps))
        computed = round(work * steps)
        if 0 < computed < steps:
            found.append(_repeating(f"cache {work:g}", None, computed))
        # Both save the same share of the work.
        computed = round(math.sqrt(work) * steps)
        if first < computed < steps:
            left = (work * steps - first) / (computed - first)
            both = _late_recipe(_merging(f"both {work:g}", ratio_for(left)), steps)
            if both.merging:
                found.append(_repeating(both.name, both.merging, computed))
    # With fewer steps there is nothing to skip.
    for name, cache in caches.items() if steps > 3 else ():
        found.append(Recipe(name, None, cache))
        if name.startswith("DeepCache"):
            found.append(Recipe(f"{name}, merge late", {"ratio": _late(0.5, steps)}, cache))
    return [each for each in found if each.cache or each.merging]


def calibrated_recipes(
    steps: int, ratio_for: "RatioForWork", blocks_for: "BlocksForWork"
) -> list[Recipe]:
    """Merging with a ratio for each block beside one for all, in all steps and late.

    >>> [recipe.name for recipe in calibrated_recipes(4, ratio_for, blocks_for)][:2]
    ['merge late 0.6', 'merge late by block 0.6']
    """
    found = []
    first = whole_steps(steps)
    for work in CALIBRATED_WORK:
        left = (work * steps - first) / (steps - first) if steps > first else 0
        pairs = [("merge late", left), ("merge", work)]
        for name, share in pairs:
            uniform, blocks = ratio_for(share), blocks_for(share)
            recipes = [_merging(f"{name} {work:g}", uniform)]
            by_block = {"ratio": blocks} if blocks else None
            recipes.append(Recipe(f"{name} by block {work:g}", by_block))
            late = name == "merge late"
            found += [_late_recipe(each, steps) if late else each for each in recipes]
    return [each for each in found if each.merging]


def _repeating(name: str, merging: Mapping[str, Any] | None, computed: int) -> Recipe:
    def cache(pipe: Any, denoiser: Any) -> AbstractContextManager[None]:
        return repeated(pipe, denoiser, partial(spread, computed=computed))

    return Recipe(name, merging, cache)


def _merging(name: str, ratio: float | None) -> Recipe:
    return Recipe(name, None if ratio is None else {"ratio": ratio, "max_downsample": 8})


def _late_recipe(recipe: Recipe, steps: int) -> Recipe:
    if recipe.merging is None:
        return recipe
    ratio = recipe.merging["ratio"]
    return Recipe(recipe.name, dict(recipe.merging) | {"ratio": _late(ratio, steps)})


def _late(ratio: Any, steps: int) -> Any:
    if isinstance(ratio, dict):
        return {name: _late(each, steps) for name, each in ratio.items()}
    first = whole_steps(steps)
    return RatioSchedule.last(ratio, since=first / steps) if first < steps else 0.0


class RatioForWork:
    """The ratio at which merging on all levels leaves a share of the blocks' work.

    >>> ratio_for = RatioForWork({0.25: 0.7, 0.5: 0.45, 0.75: 0.25})

    measured: the share of the work that is left at each ratio.
    """

    def __init__(self, measured: Mapping[float, float]):
        points = sorted((work, ratio) for ratio, work in ({0.0: 1.0} | dict(measured)).items())
        self._work, self._ratio = zip(*points, strict=True)

    def __call__(self, work: float) -> float | None:
        """None if no ratio leaves so little, or nothing needs to merge."""
        if not self._work[0] <= work < 1:
            return None
        return round(float(np.interp(work, self._work, self._ratio)), 4)


class BlocksForWork:
    """The ratios by block, from `tomesd.calibrate`'s parts, that leave a share of their work.

    >>> BlocksForWork({"a": [(0, 0, 0), (0.5, 1, 10)]}, 20)(0.75)
    {'a': 0.25}

    curves: as of `tomesd.calibration.changes`. work: of all blocks unpatched, in the same calls.
    """

    def __init__(self, curves: Curves, work: float):
        self.curves, self.work = curves, work

    def __call__(self, share: float) -> dict[str, float] | None:
        """None if merging cannot leave so little, or nothing needs to merge."""
        most = sum(curve[-1][2] for curve in self.curves.values())
        saved = (1 - share) * self.work
        return greedy(self.curves, saved) if 0 < saved <= most else None
