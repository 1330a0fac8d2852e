"""Seconds and memory for one picture with each row's merging, all rows in turns."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.memory import Peak, in_child, peak_memory
from benchmarks.common.timing import interleave, seconds
from benchmarks.pictures.picture_set import Model, Row, Run
from benchmarks.pictures.sampling import sample

# Steps that are enough to warm up and to know the memory, which does not grow with them.
FEW = 2


def measure(pipe: Any, run: Run, model: Model, rounds: int) -> dict[str, dict[str, Any]]:
    """By the row's name: "seconds" for one picture in each round, and "memory" in bytes, if it
    can be known.

    >>> measure(pipe, run, model, rounds=3)["tome 0.5"]["seconds"]
    [1.21, 1.2, 1.23]

    One batch of the run in each round, from the prompts to the pixels. Memory is the allocator's on
    a GPU; on the CPU the resident memory of a fresh process, whose weights and libraries count too.
    """
    device = torch.device(model.device)
    for row in tqdm(run.rows, desc="warming up", unit="row"):
        batch_seconds(pipe, run, row, device, FEW)
    timed = {row.name: partial(batch_seconds, pipe, run, row, device) for row in run.rows}
    with tqdm(total=rounds * len(timed), desc="speed", unit="batch") as bar:
        taken = interleave(timed, rounds, bar.update)
    count = len(run.batches[0])
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": [value / count for value in values]} for name, values in taken.items()
    }
    for row in tqdm(run.rows, desc="memory", unit="row"):
        if device.type == "cuda":
            with row.patched(pipe):
                peak = peak_memory(partial(batch, pipe, run, FEW), device).peak
        elif device.type == "cpu":
            peak = in_child(batch_peak, model, run, row).peak
        else:
            peak = None
        found[row.name]["memory"] = peak
    return found


def batch(pipe: Any, run: Run, steps: int | None = None) -> None:
    """Sample the run's first batch, in fewer steps if so many are given."""
    indices = run.batches[0]
    prompts = [run.prompts[index] for index in indices]
    how = replace(run.sampling, steps=steps or run.sampling.steps)
    for _ in sample(pipe, prompts, list(indices), how, len(indices)):
        pass


def batch_seconds(
    pipe: Any, run: Run, row: Row, device: torch.device, steps: int | None = None
) -> float:
    with row.patched(pipe):
        return seconds(partial(batch, pipe, run, steps), device)


def batch_peak(model: Model, run: Run, row: Row) -> Peak:
    """Call it in a fresh process (`memory.in_child`)."""
    pipe = model.load()
    with row.patched(pipe):
        return peak_memory(partial(batch, pipe, run, FEW), torch.device(model.device))
