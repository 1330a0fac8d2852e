"""The largest batch and the largest picture that fit into memory, found by bisection.

Running out of memory may kill the process (on a CPU it does), so all trials run in a child process.
"""

import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

import tomesd
from benchmarks.common.memory import first_line, resident
from benchmarks.pictures.picture_set import PipelineSpec
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.pictures.sampling import Sampling, sample

# The search ends at these; sides are multiples of an eighth of the model's own side, 64 px for
# Stable Diffusion 1.
MOST_PICTURES = 4096
UNITS_PER_SIDE = 8
MOST_UNITS = 128


class Largest(NamedTuple):
    """The largest value that fits, 0 if none does, and why the next one does not."""

    value: int
    reason: str


def largest(fits: Callable[[int], str], most: int) -> Largest:
    """The largest number from 1 to most that fits, by bisection: all below it must fit too.

    >>> largest(lambda n: "" if n <= 27 else "too large", most=100)
    Largest(value=27, reason='too large')

    fits: returns "" or the reason why the number does not fit.
    """
    low, high, reason = 0, 1, ""
    while high <= most:
        reason = fits(high)
        if reason:
            break
        low, high = high, min(2 * high, most) if high < most else most + 1
    else:
        return Largest(low, f"{most} is the largest value tried")
    while high - low > 1:
        middle = (low + high) // 2
        why = fits(middle)
        if why:
            high, reason = middle, why
        else:
            low = middle
    return Largest(low, reason)


class Prober:
    """A child process for trials, replaced by a new one if it dies.

    >>> with Prober(PipelineSpec(None, "cuda", torch.float16, None)) as prober:
    ...     prober.fits(DiffusionSettings(ratio=0.5), batch=8, side=512, guidance=7.5)
    ''

    limit: bytes that it may take; None for all of the device's.
    """

    def __init__(self, spec: PipelineSpec, limit: int | None = None) -> None:
        self.spec = spec
        self.limit = limit
        self._pool: ProcessPoolExecutor | None = None
        self._trials = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def fits(
        self, settings: DiffusionSettings | None, batch: int, side: int, guidance: float
    ) -> str:
        """Run two steps and decode: "" if that fits, or a line why it does not.

        More steps need no more memory. Memory that a process keeps from earlier trials (oneDNN's
        kernels for every shape, for example) counts too, so a failure is repeated in a new process.
        """
        reason = self._try(settings, batch, side, guidance)
        if reason and self._trials > 1:
            self._end()
            reason = self._try(settings, batch, side, guidance)
        return reason

    def _try(self, *arguments: Any) -> str:
        if self._pool is None:
            self._trials = 0
            self._pool = ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_load,
                initargs=(self.spec, self.limit),
            )
        self._trials += 1
        try:
            return self._pool.submit(_try, *arguments).result()
        except BrokenProcessPool:
            self._end()
            return "the process was killed"

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def find(
        self, settings: DiffusionSettings | None, side: int, guidance: float
    ) -> tuple[Largest, Largest]:
        """The largest batch of pictures with this side, and the largest side of one picture."""
        unit = side // UNITS_PER_SIDE
        batch = largest(lambda n: self.fits(settings, n, side, guidance), MOST_PICTURES)
        units = largest(lambda n: self.fits(settings, 1, n * unit, guidance), MOST_UNITS)
        return batch, units._replace(value=units.value * unit)


_pipe: Any = None


def _load(spec: PipelineSpec, limit: int | None) -> None:
    """Runs once in each child."""
    global _pipe
    _pipe = spec.load()
    if limit is not None:
        set_limit(torch.device(spec.device), limit)


def check_limit(device: torch.device, limit: int | None) -> None:
    """Raises ValueError where a limit cannot be set, or where it is required and missing."""
    if device.type == "cuda":
        return
    if device.type != "cpu" or sys.platform != "linux":
        raise ValueError(f"device must be cuda, or the cpu of Linux, to find limits, got {device}")
    if limit is None:
        raise ValueError("memory-limit must be given to find limits on the cpu, got none")


def set_limit(device: torch.device, limit: int) -> None:
    """Limit the memory of this process to so many bytes, including what it holds already."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return
    import resource  # not on Windows

    # The kernel limits reserved memory, not used memory, and more than the limit is reserved by
    # now: so the limit is set relative to it.
    status = Path("/proc/self/status").read_text()
    reserved = 1024 * int(status.partition("VmData:")[2].split()[0])
    allowed = reserved + max(0, limit - resident())
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _try(settings: DiffusionSettings | None, batch: int, side: int, guidance: float) -> str:
    merging = asdict(settings) if settings else {"ratio": 0.0}
    sampling = Sampling(2, guidance, side, side)
    try:
        with tomesd.patched(_pipe, **merging):
            for _ in sample(_pipe, ["a photo"] * batch, list(range(batch)), sampling, batch):
                pass
    except FloatingPointError:
        return ""  # It overflowed, but it fitted.
    # A kernel may also raise for a size that its indices cannot hold.
    except (MemoryError, RuntimeError) as error:
        return first_line(error)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""
