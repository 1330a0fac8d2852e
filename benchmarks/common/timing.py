"""Times that can be compared: interleaved rounds, medians, and ratios within a round.

A machine's speed drifts by more than the differences to be measured. So everything that is
compared runs once in every round, and ratios are taken round by round. Imports nothing of `tomesd`,
since the process of tomesd==0.1.3 runs this code too.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of some values and the quartiles around it.

    >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Raises ValueError if there are no values."""
        if not values:
            raise ValueError("values must hold one number or more, got none")
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long run() takes, including the work that it queued on the device.

    >>> seconds(lambda: sum(range(1000)), torch.device("cpu")) > 0
    True
    """
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def merging_seconds(
    match: Callable[[], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]], x: Tensor
) -> dict[str, float]:
    """How long each of the three steps of token merging takes: match, merge, unmerge.

    >>> merging_seconds(lambda: (torch.clone, torch.clone), torch.ones(1, 4, 2)).keys()
    dict_keys(['match', 'merge', 'unmerge'])

    match: makes a token map and returns its merge and unmerge. x: [B, N, C], the tokens to merge.
    All three run once before, untimed: threads of another process that still spin after their own
    run would otherwise count.
    """
    merge, unmerge = match()
    unmerge(merge(x))
    merged = merge(x)
    return {
        "match": seconds(match, x.device),
        "merge": seconds(lambda: merge(x), x.device),
        "unmerge": seconds(lambda: unmerge(merged), x.device),
    }


def interleave(
    runs: Mapping[str, Callable[[], T]], rounds: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[T]]:
    """What each run returns in each round; the rounds of all runs are interleaved.

    >>> interleave({"a": lambda: 1, "b": lambda: 2}, rounds=3)
    {'a': [1, 1, 1], 'b': [2, 2, 2]}

    The run that starts a round rotates, so that none always follows the same one. tick: called
    after each run, for a progress bar. There is no warm-up.
    Raises ValueError if rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    for index in range(rounds):
        start = index % max(1, len(names))
        for name in names[start:] + names[:start]:
            results[name].append(runs[name]())
            tick()
    return results


def round_ratio(first: Sequence[float], second: Sequence[float]) -> Spread:
    """first / second, round by round: how many times as fast the second is.

    >>> round_ratio([2.0, 4.0], [1.0, 2.0]).median
    2.0
    """
    return Spread.of([a / b for a, b in zip(first, second, strict=True)])


def share_of_ideal(
    base: Sequence[float], other: Sequence[float], ideal: Sequence[float]
) -> Spread | None:
    """The share of the ideal's saving that is reached, round by round: (t₀ − t) / (t₀ − t_ideal).

    >>> share_of_ideal([3.0], [2.5], [2.0]).median
    0.5

    None if the ideal was not faster in every round: then there is no saving to take a share of.
    """
    rounds = list(zip(base, other, ideal, strict=True))
    if any(i >= b for b, _, i in rounds):
        return None
    return Spread.of([(b - o) / (b - i) for b, o, i in rounds])
