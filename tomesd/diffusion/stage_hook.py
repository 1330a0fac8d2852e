"""How a model learns in which stage of the denoising it is called, where the ratio changes.

Imported only then: `torch.compiler.disable` imports the compiler.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tomesd.diffusion.ratio_schedule import RatioPlan
from tomesd.hooks import Threads, by_name


@dataclass(eq=False)
class StageHook:
    """Notes the stage for the thread that calls the model, before it runs.

    names: the model's arguments in order. timestep: which of them tells the step.
    """

    threads: Threads[Any]
    plan: RatioPlan
    names: tuple[str, ...]
    timestep: str
    warned: bool = False

    # A model's own hooks are no part of its graph, so that this may look at the scheduler.
    @torch.compiler.disable
    def note(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        given = by_name(self.names, args, kwargs)
        self.threads.run.stage = self.plan.stage(given[self.timestep])
        why_idle = "" if self.warned else self.plan.why_idle()
        if why_idle:
            self.warned = True
            warnings.warn(f"nothing merges in {type(model).__name__}: {why_idle}", stacklevel=2)
