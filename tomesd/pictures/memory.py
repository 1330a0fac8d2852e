"""The most memory that some work needs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def with_peak(run: Callable[[], T], device: torch.device | str) -> tuple[T, int | None]:
    """What run() returns, and the most bytes in use while it ran, weights included.

    >>> with_peak(lambda: torch.ones(8).sum().item(), "cpu")[0]
    8.0

    On CUDA, what torch has allocated; on Linux, this process's resident memory, of which little is
    ever returned to the system: so a second run needs no more. None on other systems.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return run(), torch.cuda.max_memory_allocated(device)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # proc(5): resets the peak.
    except OSError:
        return run(), None
    result = run()
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return result, int(found[1]) * 1024 if found and kind == "cpu" else None
