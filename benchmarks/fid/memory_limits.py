"""The largest batch and the largest picture that memory allows, found by trying in a child process.

A try that fails may take its process with it (a CPU that runs out of memory does), so none is made
in this one.
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
from benchmarks.pictures.picture_set import Model
from benchmarks.pictures.sampling import Sampling, sample
from tomesd.diffusion.settings import DiffusionSettings

# What batches and sides are multiples of, and where looking for the largest ends.
MOST_PICTURES = 4096
UNITS_PER_SIDE = 8  # in the side that the model was made for: 64 px for Stable Diffusion 1
MOST_UNITS = 128


class Largest(NamedTuple):
    """The largest that fits, 0 if nothing does; and why the next one does not."""

    value: int
    reason: str


def largest(fits: Callable[[int], str], most: int) -> Largest:
    """The largest number from 1 to most that fits, if all below it do too, in O(log) tries.

    >>> largest(lambda n: "" if n <= 27 else "too large", most=100)
    Largest(value=27, reason='too large')

    fits: gives "" or the reason why it does not.
    """
    low, high, reason = 0, 1, ""
    while high <= most:
        reason = fits(high)
        if reason:
            break
        low, high = high, min(2 * high, most) if high < most else most + 1
    else:
        return Largest(low, f"{most} is the largest that was tried")
    while high - low > 1:
        middle = (low + high) // 2
        why = fits(middle)
        if why:
            high, reason = middle, why
        else:
            low = middle
    return Largest(low, reason)


class Prober:
    """A child process that tries pictures, and another one in its place if it dies.

    >>> with Prober(Model(None, "cuda", torch.float16, None)) as prober:
    ...     prober.fits(DiffusionSettings(ratio=0.5), batch=8, side=512, guidance=7.5)
    ''

    limit: bytes that it may take; None for all that there are.
    """

    def __init__(self, model: Model, limit: int | None = None) -> None:
        self.model = model
        self.limit = limit
        self._pool: ProcessPoolExecutor | None = None
        self._tries = 0

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
        """Whether two steps and decoding go through: "", or in a line why they do not.

        More steps need no more memory. What a process keeps of earlier tries (oneDNN, for one, its
        kernels for every shape) is memory too: only what fails in a new one does not fit.
        """
        reason = self._try(settings, batch, side, guidance)
        if reason and self._tries > 1:
            self._end()
            reason = self._try(settings, batch, side, guidance)
        return reason

    def _try(self, *asked: Any) -> str:
        if self._pool is None:
            self._tries = 0
            self._pool = ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_load,
                initargs=(self.model, self.limit),
            )
        self._tries += 1
        try:
            return self._pool.submit(_try, *asked).result()
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


def _load(model: Model, limit: int | None) -> None:
    """Runs once in each child."""
    global _pipe
    _pipe = model.load()
    if limit is not None:
        set_limit(torch.device(model.device), limit)


def check_limit(device: torch.device, limit: int | None) -> None:
    """Raises ValueError where a limit cannot be set, or must be and is not."""
    if device.type == "cuda":
        return
    if device.type != "cpu" or sys.platform != "linux":
        raise ValueError(f"limits can be found on cuda, and on the cpu of Linux, not {device}")
    if limit is None:
        raise ValueError("memory-limit must be given to find limits on the cpu")


def set_limit(device: torch.device, limit: int) -> None:
    """From now on this process gets no more than so many bytes, with what it holds already."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return
    import resource  # not on Windows

    # The kernel limits what is reserved, not what is used: a process has reserved more than that
    # by now, and is allowed to go on from there.
    status = Path("/proc/self/status").read_text()
    reserved = 1024 * int(status.partition("VmData:")[2].split()[0])
    allowed = reserved + max(0, limit - resident())
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _try(settings: DiffusionSettings | None, batch: int, side: int, guidance: float) -> str:
    merging = asdict(settings) if settings else {"ratio": 0.0}
    how = Sampling(2, guidance, side, side)
    try:
        with tomesd.patched(_pipe, **merging):
            for _ in sample(_pipe, ["a photo"] * batch, list(range(batch)), how, batch):
                pass
    except FloatingPointError:
        return ""  # it overflowed, but it did fit
    # A kernel may also refuse a size that it cannot count.
    except (MemoryError, RuntimeError) as error:
        return first_line(error)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""
