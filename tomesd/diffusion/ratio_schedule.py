"""How much merges in which part of the denoising, and where a pipeline is in it."""

import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

# A compiled model is compiled anew for each ratio, and torch.compile gives up after eight times.
MOST_PIECES = 6


@dataclass(frozen=True)
class RatioSchedule:
    """A ratio for each part of the denoising, constant within each of a few pieces.

    >>> tomesd.apply_patch(pipe, ratio=tomesd.RatioSchedule.last(0.5, since=0.5))
    >>> tomesd.RatioSchedule.ramp(0.6, 0.2, pieces=3).pieces
    ((0.3333333333333333, 0.6), (0.6666666666666666, 0.4), (1.0, 0.2))

    pieces: (until, ratio) in order: the ratio up to which progress, from 0 before the first step
        to 1, where the last piece must end. Progress is the share of the scheduler's steps that are
        done: the first k of n steps end at k/n, and image-to-image with strength 0.6 begins at 0.4.
        At most six pieces, so that a compiled model is compiled a few times and no more.

    Raises TypeError or ValueError, naming what is wrong and what is allowed.
    """

    pieces: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.pieces) <= MOST_PIECES:
            raise ValueError(f"pieces must be 1 to {MOST_PIECES}, got {len(self.pieces)}")
        for value in (value for piece in self.pieces for value in piece):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"pieces must be pairs of numbers, got {self.pieces!r}")
        ends = [float(until) for until, _ in self.pieces]
        if ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ValueError(
                f"pieces must end at rising shares of the steps, the last at 1, got {ends}"
            )
        plain = tuple((float(until), float(ratio)) for until, ratio in self.pieces)
        object.__setattr__(self, "pieces", plain)

    @classmethod
    def last(cls, ratio: float, since: float) -> "RatioSchedule":
        """Merge in the last part of the steps only: the picture is laid out by then, and changes
        least (`scripts/quality.py`).

        >>> RatioSchedule.last(0.5, since=10 / 25).pieces  # all but the first 10 of 25 steps
        ((0.4, 0.0), (1.0, 0.5))
        """
        return cls(((since, 0.0), (1.0, ratio)))

    @classmethod
    def first(cls, ratio: float, until: float) -> "RatioSchedule":
        """Merge in the first part of the steps only, and leave the details to whole tokens.

        >>> RatioSchedule.first(0.5, until=10 / 25).pieces  # the first 10 of 25 steps
        ((0.4, 0.5), (1.0, 0.0))
        """
        return cls(((until, ratio), (1.0, 0.0)))

    @classmethod
    def ramp(cls, start: float, end: float, pieces: int = 4) -> "RatioSchedule":
        """From one ratio in the first steps to another in the last, in equal stairs.

        >>> RatioSchedule.ramp(0.5, 0.0, pieces=2).pieces
        ((0.5, 0.5), (1.0, 0.0))
        """
        _check_count(pieces)
        steps = max(1, pieces - 1)
        return cls._even([start + (end - start) * i / steps for i in range(pieces)])

    @classmethod
    def of(cls, function: Callable[[float], float], pieces: int = 4) -> "RatioSchedule":
        """Any function of progress, taken in the middle of each of a few equal pieces.

        >>> RatioSchedule.of(lambda progress: 0.5 * progress, pieces=2).pieces
        ((0.5, 0.125), (1.0, 0.375))
        """
        _check_count(pieces)
        return cls._even([function((i + 0.5) / pieces) for i in range(pieces)])

    @classmethod
    def _even(cls, ratios: list[float]) -> "RatioSchedule":
        return cls(tuple(((i + 1) / len(ratios), ratio) for i, ratio in enumerate(ratios)))

    def at(self, until: float) -> float:
        """The ratio of the piece in which a part of the denoising ends.

        >>> RatioSchedule.first(0.5, until=0.4).at(0.2)
        0.5
        """
        return next(ratio for end, ratio in self.pieces if until <= end)


OneRatio = float | RatioSchedule | Callable[[float], float]
Ratio = OneRatio | Mapping[int, OneRatio]


class RatioPlan:
    """The ratio of each level of a model in each stage of the denoising.

    >>> RatioPlan({1: RatioSchedule.first(0.5, until=0.4), 2: 0.25}, pipe).of_level(1)
    (0.5, 0.0)

    ratio: a number, a `RatioSchedule` or a function of progress; or a dict of these by level, that
        is, by how much coarser its grid is than the finest one with attention.
    pipe: the diffusers pipeline whose scheduler tells the steps, where the ratio changes over them.
    ends: of the stages, in which the ratio changes at no level.

    Raises TypeError or ValueError, naming what is wrong and what is allowed.
    """

    def __init__(self, ratio: Any, pipe: Any):
        levels = ratio if isinstance(ratio, Mapping) else {0: ratio}
        if not levels or (levels is ratio and not all(map(_is_level, ratio))):
            raise ValueError(
                "ratio by level must name how much coarser than the finest each level is, for "
                f"example {{1: 0.5, 2: 0.25}}, got {ratio!r}"
            )
        self.schedules = {level: _schedule(each) for level, each in levels.items()}
        ends = {end for each in self.schedules.values() for end, _ in each.pieces}
        self.ends = tuple(sorted(ends))
        if len(ends) > MOST_PIECES:
            raise ValueError(f"ratio must change at most {MOST_PIECES - 1} times, got {self.ends}")
        self.steps = None
        if len(ends) > 1:
            if not hasattr(getattr(pipe, "scheduler", None), "timesteps"):
                raise TypeError(
                    "ratio must be a float where no pipeline with a scheduler tells the steps: "
                    f"a schedule needs apply_patch(pipe, ...), got a {type(pipe).__name__}"
                )
            self.steps = Steps(pipe)

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(ratio for each in self.schedules.values() for _, ratio in each.pieces)

    @property
    def changes(self) -> bool:
        """Whether it depends on the step."""
        return self.steps is not None

    @property
    def names_levels(self) -> bool:
        return 0 not in self.schedules

    def check_levels(self, levels: list[int]) -> None:
        """Raises ValueError for a level that is named but not there."""
        missing = set(self.schedules) - {0, *levels}
        if missing:
            there = ", ".join(map(str, levels)) or "none"
            raise ValueError(f"ratio by level must name levels among {there}, got {min(missing)}")

    def of_level(self, level: int) -> tuple[float, ...]:
        """Its ratio in each stage; 0 for a level that is not named."""
        schedule = self.schedules.get(0) or self.schedules.get(level)
        return tuple(schedule.at(end) if schedule else 0.0 for end in self.ends)

    def stage(self, timestep: Any) -> int:
        """The number of the stage in which the model is called with this timestep."""
        return self._stage_at(self.steps.progress(timestep)) if self.steps else 0

    def _stage_at(self, progress: float) -> int:
        # Ten of 25 steps are 0.4, however that rounds.
        return sum(progress >= end - 1e-6 for end in self.ends[:-1])

    def why_idle(self) -> str:
        """Why nothing merges in any step of the picture that is being made, or nothing if some do.

        A turbo model's only step is both the first and the last.
        """
        if self.steps is None:
            return ""
        first, last = map(self._stage_at, self.steps.span())
        ends = self.ends[first : last + 1]
        if any(each.at(end) for each in self.schedules.values() for end in ends):
            return ""
        return f"the ratio is 0 in each of the steps that it takes, {self.steps.count} in all"


def _check_count(pieces: Any) -> None:
    if type(pieces) is not int or not 1 <= pieces <= MOST_PIECES:
        raise ValueError(f"pieces must be a whole number from 1 to {MOST_PIECES}, got {pieces!r}")


def _is_level(level: Any) -> bool:
    return type(level) is int and level > 0


def _schedule(ratio: Any) -> RatioSchedule:
    if isinstance(ratio, RatioSchedule):
        return ratio
    if callable(ratio):
        return RatioSchedule.of(ratio)
    if isinstance(ratio, Real) and not isinstance(ratio, bool):
        return RatioSchedule(((1.0, float(ratio)),))
    raise TypeError(
        "ratio must be a float, a RatioSchedule, a function of progress, or a dict of these by "
        f"level, got {ratio!r}"
    )


class Steps:
    """Where a pipeline is in its denoising, as its scheduler counts it.

    >>> Steps(pipe).progress(timestep)

    pipe: a diffusers pipeline with a scheduler, which may be exchanged later. It is not kept alive:
        a model must not hold on to the pipeline that it was part of. Most schedulers count their
        steps in a Python number, so that nothing waits for the device. DDIM, DDPM and PNDM do not:
        they read each step's timestep from the device themselves, and so does this.
    """

    def __init__(self, pipe: Any):
        self._pipe: Callable[[], Any] = weakref.ref(pipe)
        self._scheduler = pipe.scheduler

    @property
    def scheduler(self) -> Any:
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        return self._scheduler

    def __deepcopy__(self, memo: dict) -> "Steps":
        # A copied pipeline's model follows the copy, a model copied alone its old pipeline.
        copied = memo.get(id(self._pipe()))
        steps = _alone(self.scheduler if copied is None else deepcopy(self.scheduler, memo))
        steps._pipe = self._pipe if copied is None else weakref.ref(copied)
        return steps

    def __reduce__(self) -> tuple:
        # The model alone, not its pipeline: in a pipeline's pickle it is the same scheduler.
        return _alone, (self.scheduler,)

    @property
    def count(self) -> int:
        return len(self.scheduler.timesteps)

    def span(self) -> tuple[float, float]:
        """The progress at which a picture's first and last step are called, as far as the scheduler
        knows: where image-to-image begins, DDIM, DDPM and PNDM are not told."""
        begin = getattr(self.scheduler, "_begin_index", None) or 0
        return begin / self.count, (self.count - 1) / self.count

    def progress(self, timestep: Any) -> float:
        """The share of the steps that are done, when the model is called with this timestep."""
        scheduler = self.scheduler
        steps = self.count
        if hasattr(scheduler, "_step_index"):
            done = scheduler._step_index
            if done is None:  # Until the first step, begin_index says where to start.
                done = scheduler._begin_index or 0
            return done / steps
        now = float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)
        return int((scheduler.timesteps.cpu() > now).sum()) / steps


def _alone(scheduler: Any) -> Steps:
    """The steps of a scheduler whose pipeline is gone or elsewhere."""
    steps = Steps.__new__(Steps)
    steps._pipe, steps._scheduler = _gone, scheduler
    return steps


def _gone() -> None:
    return None
