"""How a model learns in which stage of the denoising it is called, if the ratio changes over it.

Imported only then: `torch.compiler.disable` imports the compiler.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tomesd.diffusion.block import ThreadState
from tomesd.diffusion.ratio_plan import RatioPlan
from tomesd.hooks import PerThread, by_name, unless_removed

# Guidance calls a model a few times in one step.
_MOST_UNSTEPPED = 8


@dataclass(eq=False)
class StageHook:
    """Records the stage for the thread that calls the model, before the model runs.

    names: the model's arguments in order. timestep: the one that holds the timestep. unstepped: the
    calls since the scheduler's last step.
    """

    threads: PerThread[ThreadState]
    plan: RatioPlan
    names: tuple[str, ...]
    timestep: str
    warned: bool = False
    unstepped: int = 0

    # A model's own hooks are not part of its graph, so this may read the scheduler.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @unless_removed
    def record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(self.names, args, kwargs)
        self.threads.state.stage = self.plan.stage(given[self.timestep])
        why_idle = "" if self.warned else self.plan.why_idle() or self._why_stuck()
        if why_idle:
            self.warned = True
            warnings.warn(f"nothing merges in {type(model).__name__}: {why_idle}", stacklevel=2)

    def _why_stuck(self) -> str:
        """What is wrong if somebody calls the model in steps that its pipeline's scheduler does not
        take: for each of them it would be the first."""
        steps = self.plan.steps
        self.unstepped = 0 if steps is None or steps.stepped else self.unstepped + 1
        if self.unstepped < _MOST_UNSTEPPED:
            return ""
        return (
            f"its pipeline's scheduler took no step in {self.unstepped} calls, so that all have "
            'the ratio of the first step; preset="steady" merges in every call'
        )
