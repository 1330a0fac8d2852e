"""Peak memory: what the allocator of a GPU counts, or the resident memory of a child process.

Imports nothing of `tomesd`, since the process of tomesd==0.1.3 runs this code too.
"""

import multiprocessing
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Peak(NamedTuple):
    """Bytes in use just before some work, weights included, and the most while it ran."""

    before: int
    peak: int


def peak_memory(run: Callable[[], object], device: torch.device) -> Peak:
    """The memory that run() needs.

    >>> peak = peak_memory(lambda: model(x), torch.device("cuda"))

    On CUDA, what torch has allocated. On the CPU, this process's resident memory, of which
    little is ever returned to the system: measure in a fresh process, see `in_child`.
    Raises ValueError for other devices: they count no peak. Warns if the earlier peak cannot be
    reset and may be counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return Peak(before, torch.cuda.max_memory_allocated(device))
    if device.type == "cpu":
        _reset_peak()
        before = resident()
        run()
        return Peak(before, peak_resident())
    raise ValueError(f"device must be cuda or cpu, got {device.type}")


def resident() -> int:
    """Bytes of physical memory that this process holds now (its peak so far on macOS)."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes of physical memory that this process has held.

    >>> peak_resident() > 0
    True
    """
    return _status("VmHWM")


def _reset_peak() -> None:
    """Reset the peak, so that loading the model does not count, for example."""
    try:
        # proc(5): 5 resets the peak to the current resident memory.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        warnings.warn(
            f"the peak of memory includes earlier work, it cannot be reset: {error}",
            stacklevel=3,
        )


def _status(field: str) -> int:
    # Not ru_maxrss where it can be avoided: on Linux a child starts with its parent's.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def ran_out(error: Exception) -> bool:
    """Whether memory ran out; on the CPU, torch raises a plain RuntimeError.

    >>> ran_out(MemoryError()), ran_out(RuntimeError("shapes do not fit"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """The first line of an error, for a table.

    >>> first_line(ValueError("size must be 8 or more\\nand even")), first_line(MemoryError())
    ('size must be 8 or more', 'MemoryError')
    """
    return str(error).partition("\n")[0] or type(error).__name__


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """The result of function(*args) in a fresh process, whose memory is freed with it.

    >>> in_child(math.sqrt, 4.0)
    2.0

    function, args and the result must be picklable, and a script that calls this needs the usual
    `if __name__ == "__main__"`.
    Raises MemoryError if memory ran out in the child or the system killed it, and RuntimeError with
    the child's traceback for any other exception.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, args), daemon=True)
    child.start()
    theirs.close()
    try:
        raised, result = ours.recv()
    except EOFError:
        child.join()
        raise MemoryError(
            f"{function.__name__} was killed in its process (exit code {child.exitcode})"
        ) from None
    finally:
        ours.close()
    child.join()
    if raised:
        raise raised(result)
    return result


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple) -> None:
    answer: tuple[type[Exception] | None, Any]
    try:
        answer = (None, function(*args))
    except Exception as error:
        where = f"{function.__name__} failed in its process:"
        if ran_out(error):
            answer = (MemoryError, f"{where} {first_line(error)}")
        else:
            answer = (RuntimeError, f"{where}\n{traceback.format_exc()}")
    pipe.send(answer)
    pipe.close()
