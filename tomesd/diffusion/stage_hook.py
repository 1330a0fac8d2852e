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
_MOST_UNKNOWN = 8


@dataclass(eq=False)
class StageHook:
    """Records the stage for the thread that calls the model, before the model runs.

    names: the model's arguments in order. timestep: the one that holds the timestep.
    """

    threads: PerThread[ThreadState]
    plan: RatioPlan
    names: tuple[str, ...]
    timestep: str
    warned: bool = False

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
        unknown = self.plan.steps.unknown if self.plan.steps else 0
        if unknown < _MOST_UNKNOWN:
            return ""
        return (
            f"its pipeline's scheduler took no step in {unknown} calls at timesteps that it does "
            'not have, so that all have the ratio of the first; preset="steady" merges in every one'
        )
