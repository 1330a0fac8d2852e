"""Where a diffusers pipeline is in its denoising, as its scheduler counts the steps."""

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch


class SchedulerSteps:
    """The progress of a pipeline through its denoising steps.

    >>> SchedulerSteps(pipe).progress(timestep)

    pipe: a diffusers pipeline with a scheduler, which may be replaced later. It is kept by a weak
        reference: a model must not keep its pipeline alive. Most schedulers count their steps in a
        Python number, so nothing syncs after the first one. DDIM, DDPM and PNDM do not: they read
        each timestep from the device themselves, and so does this.
    unknown: how many calls in a row were at a timestep that the scheduler does not have, without
        that it took a step.
    """

    unknown = 0

    def __init__(self, pipe: Any):
        self._pipe: Callable[[], Any] = weakref.ref(pipe)
        self._scheduler = pipe.scheduler

    @property
    def scheduler(self) -> Any:
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        return self._scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> "SchedulerSteps":
        # The model of a copied pipeline follows the copy; a model copied without it, the original.
        copied = memo.get(id(self._pipe()))
        steps = _without_pipeline(
            self.scheduler if copied is None else deepcopy(self.scheduler, memo)
        )
        steps._pipe = self._pipe if copied is None else weakref.ref(copied)
        return steps

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the pipeline; in a pickle of the pipeline, the scheduler is the same object.
        return _without_pipeline, (self.scheduler,)

    @property
    def count(self) -> int:
        return len(self.scheduler.timesteps)

    def span(self) -> tuple[float, float]:
        """The progress of an image's first and last step, as far as the scheduler knows: DDIM, DDPM
        and PNDM do not know where image-to-image begins."""
        begin = getattr(self.scheduler, "_begin_index", None) or 0
        return begin / self.count, (self.count - 1) / self.count

    def progress(self, timestep: Any) -> float:
        """The share of the steps that are done when the model is called with this timestep."""
        scheduler = self.scheduler
        steps, counts = self.count, hasattr(scheduler, "_step_index")
        done = scheduler._step_index if counts else None
        if counts and done is None:  # Before the first step: begin_index is where to start.
            done = scheduler._begin_index
        if done is not None:
            self.unknown = 0
            return float(done / steps)
        now = float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)
        timesteps = scheduler.timesteps.cpu().double()
        # A pipeline may step copies of its scheduler, begin in the middle without a begin_index, or
        # give its model the timesteps in another unit: then this is the first one.
        same_unit = now > 1 or bool(timesteps.max() <= 1)  # Flow models often get t / 1000.
        found = same_unit and bool((timesteps - now).abs().min() <= 1e-6 * abs(now))
        known = not counts or found
        self.unknown = 0 if known else self.unknown + 1
        return int((timesteps > now).sum()) / steps if known else 0.0


def _without_pipeline(scheduler: Any) -> SchedulerSteps:
    """The steps of a scheduler whose pipeline is unknown."""
    steps = SchedulerSteps.__new__(SchedulerSteps)
    steps._pipe, steps._scheduler = _gone, scheduler
    return steps


def _gone() -> None:
    return None
