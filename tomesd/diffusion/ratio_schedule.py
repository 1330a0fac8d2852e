"""Ratios that change over the denoising steps, and all forms in which a ratio may be given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

# A compiled model is compiled once per ratio, and torch.compile gives up after eight times.
MOST_PIECES = 6


@dataclass(frozen=True)
class RatioSchedule:
    """A ratio that changes over the denoising steps: piecewise constant.

    >>> tomesd.apply_patch(pipe, ratio=tomesd.RatioSchedule.last(0.5, since=0.5))
    >>> tomesd.RatioSchedule.ramp(0.6, 0.2, pieces=3).pieces
    ((0.3333333333333333, 0.6), (0.6666666666666666, 0.4), (1.0, 0.2))

    pieces: (until, ratio) in order: the ratio up to that progress, which is 0 before the first step
        and 1 after the last; the last piece must end at 1. Progress is the share of the scheduler's
        steps that are done: the first k of n steps end at k/n, and image-to-image with strength 0.6
        begins at 0.4. At most six pieces; each is compiled once.

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
        """Merge only in the last part of the steps: the layout of the image is settled by then, and
        merging changes it least (`scripts/quality.py`).

        >>> RatioSchedule.last(0.5, since=10 / 25).pieces  # all but the first 10 of 25 steps
        ((0.4, 0.0), (1.0, 0.5))
        """
        return cls(((since, 0.0), (1.0, ratio)))

    @classmethod
    def first(cls, ratio: float, until: float) -> "RatioSchedule":
        """Merge only in the first part of the steps, and compute the details with all tokens.

        >>> RatioSchedule.first(0.5, until=10 / 25).pieces  # the first 10 of 25 steps
        ((0.4, 0.5), (1.0, 0.0))
        """
        return cls(((until, ratio), (1.0, 0.0)))

    @classmethod
    def ramp(cls, start: float, end: float, pieces: int = 4) -> "RatioSchedule":
        """From one ratio in the first steps to another in the last, in equal pieces.

        >>> RatioSchedule.ramp(0.5, 0.0, pieces=2).pieces
        ((0.5, 0.5), (1.0, 0.0))
        """
        _check_count(pieces)
        steps = max(1, pieces - 1)
        return cls._even([start + (end - start) * i / steps for i in range(pieces)])

    @classmethod
    def of(cls, function: Callable[[float], float], pieces: int = 4) -> "RatioSchedule":
        """Any function of progress, evaluated at the middle of each of a few equal pieces.

        >>> RatioSchedule.of(lambda progress: 0.5 * progress, pieces=2).pieces
        ((0.5, 0.125), (1.0, 0.375))
        """
        _check_count(pieces)
        return cls._even([function((i + 0.5) / pieces) for i in range(pieces)])

    @classmethod
    def _even(cls, ratios: list[float]) -> "RatioSchedule":
        return cls(tuple(((i + 1) / len(ratios), ratio) for i, ratio in enumerate(ratios)))

    def at(self, until: float) -> float:
        """The ratio of the piece that holds this progress.

        >>> RatioSchedule.first(0.5, until=0.4).at(0.2)
        0.5
        """
        return next(ratio for end, ratio in self.pieces if until <= end)


class LateSchedule(RatioSchedule):
    """What the preset "late" makes of a ratio: nothing merges in the first fifth of the steps, in
    which the layout settles. The only step of an image merges."""

    @classmethod
    def of_ratio(cls, ratio: Any) -> "NormalRatio":
        """The ratio, or those of all levels, where they do not change over the steps by themselves.

        >>> LateSchedule.of_ratio(0.5).pieces
        ((0.2, 0.0), (1.0, 0.5))
        """
        found = normal_ratio(ratio)
        if isinstance(found, dict):
            return {level: cls.of_ratio(each) for level, each in found.items()}  # type: ignore[misc]
        return found if isinstance(found, RatioSchedule) else cls(((0.2, 0.0), (1.0, found)))


# What apply_patch takes as a ratio, and the forms that remain once functions are sampled.
OneRatio = float | RatioSchedule | Callable[[float], float]
Ratio = OneRatio | Mapping[int, OneRatio]
NormalRatio = float | RatioSchedule | dict[int, float | RatioSchedule]


def normal_ratio(ratio: Any) -> NormalRatio:
    """A float, a RatioSchedule, or a dict of these by level, from any form of a ratio.

    >>> normal_ratio({1: 0.5, 2: lambda progress: 0.5 * progress})[1]
    0.5

    Raises TypeError for any other type, ValueError for levels that are not whole numbers from 1.
    """
    if not isinstance(ratio, Mapping):
        return _one_ratio(ratio)
    if not ratio or not all(type(level) is int and level > 0 for level in ratio):
        raise ValueError(
            "ratio by level must name how much coarser than the finest each level is, for "
            f"example {{1: 0.5, 2: 0.25}}, got {ratio!r}"
        )
    return {level: _one_ratio(each) for level, each in ratio.items()}


def all_ratios(ratio: NormalRatio) -> list[float]:
    """Every value that a ratio takes, at any level in any step.

    >>> all_ratios(RatioSchedule.last(0.5, since=0.4))
    [0.0, 0.5]
    """
    if isinstance(ratio, dict):
        return [value for each in ratio.values() for value in all_ratios(each)]
    return [value for _, value in ratio.pieces] if isinstance(ratio, RatioSchedule) else [ratio]


def _one_ratio(ratio: Any) -> float | RatioSchedule:
    if isinstance(ratio, RatioSchedule):
        return ratio
    if callable(ratio):
        return RatioSchedule.of(ratio)
    if isinstance(ratio, Real) and not isinstance(ratio, bool):
        return float(ratio)
    raise TypeError(
        "ratio must be a float, a RatioSchedule, a function of progress, or a dict of these by "
        f"level, got {ratio!r}"
    )


def _check_count(pieces: Any) -> None:
    if type(pieces) is not int or not 1 <= pieces <= MOST_PIECES:
        raise ValueError(f"pieces must be a whole number from 1 to {MOST_PIECES}, got {pieces!r}")
