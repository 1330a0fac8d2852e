"""Calls of one model in several threads, and the replicas that DataParallel makes of it.

No test waits for a time: threads meet at barriers. A barrier's timeout only ends a test that hangs.
"""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

HANGS = 300  # Seconds; nothing takes that long on the slowest machine.


def meeting(threads: int) -> threading.Barrier:
    """Where so many threads wait for one another."""
    return threading.Barrier(threads, timeout=HANGS)


def side_by_side(
    calls: list[Callable[[], T]], times: int = 1, meet_in: Iterable[nn.Module] = ()
) -> list[list[T]]:
    """What each call returns, so many times, in a thread of its own; all begin at once.

    meet_in: modules that the threads enter and leave together, so that whatever they share is
    shared at its worst.
    """
    barrier = meeting(len(calls))
    outputs: list[list[T]] = [[] for _ in calls]

    def meet(*_) -> None:
        barrier.wait()

    handles = []
    for module in meet_in:
        handles.append(module.register_forward_pre_hook(meet))
        handles.append(module.register_forward_hook(meet))

    def run(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(times):
                outputs[index].append(calls[index]())
        except BaseException:
            barrier.abort()  # Or the others would wait.
            raise

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert all(len(output) == times for output in outputs), "a thread failed, see its traceback"
    return outputs


def replicate(module: nn.Module, copy_weights: bool = False) -> nn.Module:
    """As torch.nn.parallel.replicate, but on the same device: hooks are shared.

    copy_weights: whether the replica has weights of its own, as on another device.
    """

    def own(parameter: torch.Tensor | None) -> torch.Tensor | None:
        if parameter is None or not copy_weights:
            return parameter
        return parameter.detach().clone()

    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, own(parameter))
    for name, child in module._modules.items():
        setattr(replica, name, None if child is None else replicate(child, copy_weights))
    return replica
