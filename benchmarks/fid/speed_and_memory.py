"""Seconds and memory per picture of each method, with interleaved rounds."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.memory import Peak, in_child, peak_memory
from benchmarks.common.timing import interleave, seconds
from benchmarks.pictures.picture_set import Method, PictureSet, PipelineSpec
from tomesd.pictures.sampling import sample

# Steps that suffice for the warm-up and for the memory, which does not grow with them.
FEW = 2


def measure(
    pipe: Any, pictures: PictureSet, spec: PipelineSpec, rounds: int
) -> dict[str, dict[str, Any]]:
    """By the method's name: "seconds" per picture in each round, and "memory" in bytes.

    >>> measure(pipe, pictures, spec, rounds=3)["tome 0.5"]["seconds"]
    [1.21, 1.2, 1.23]

    One batch in each round, from the prompts to the pixels. Memory is the allocator's on a GPU; on
    the CPU the resident memory of a fresh process, including weights and libraries; else None.
    """
    device = torch.device(spec.device)
    for method in tqdm(pictures.methods, desc="warm-up", unit="row"):
        batch_seconds(pipe, pictures, method, device, FEW)
    timed = {
        method.name: partial(batch_seconds, pipe, pictures, method, device)
        for method in pictures.methods
    }
    with tqdm(total=rounds * len(timed), desc="speed", unit="batch") as bar:
        times = interleave(timed, rounds, bar.update)
    count = len(pictures.batches[0])
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": [value / count for value in values]} for name, values in times.items()
    }
    for method in tqdm(pictures.methods, desc="memory", unit="row"):
        if device.type == "cuda":
            with method.patched(pipe):
                peak = peak_memory(partial(sample_batch, pipe, pictures, FEW), device).peak
        elif device.type == "cpu":
            peak = in_child(batch_peak, spec, pictures, method).peak
        else:
            peak = None
        found[method.name]["memory"] = peak
    return found


def sample_batch(pipe: Any, pictures: PictureSet, steps: int | None = None) -> None:
    """Sample the first batch, with `steps` steps if given."""
    indices = pictures.batches[0]
    prompts = [pictures.prompts[index] for index in indices]
    sampling = replace(pictures.sampling, steps=steps or pictures.sampling.steps)
    for _ in sample(pipe, prompts, list(indices), sampling, len(indices)):
        pass


def batch_seconds(
    pipe: Any, pictures: PictureSet, method: Method, device: torch.device, steps: int | None = None
) -> float:
    """Seconds for the first batch with a method."""
    with method.patched(pipe):
        return seconds(partial(sample_batch, pipe, pictures, steps), device)


def batch_peak(spec: PipelineSpec, pictures: PictureSet, method: Method) -> Peak:
    """Peak memory of the first batch; call it in a fresh process (`memory.in_child`)."""
    pipe = spec.load()
    with method.patched(pipe):
        return peak_memory(partial(sample_batch, pipe, pictures, FEW), torch.device(spec.device))
