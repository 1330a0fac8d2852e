"""The hooks on a diffusion transformer itself: in which forward pass its blocks are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tomesd.core.rows import fixed
from tomesd.diffusion.block import Place, ThreadState
from tomesd.diffusion.conflicts import check_cache
from tomesd.diffusion.dit.spec import DiT
from tomesd.hooks import PerThread, by_name, unless_removed

Args = tuple[Any, ...]
Given = dict[str, Any]


@dataclass(eq=False)
class ModelHooks:
    """The hooks on the model itself.

    last: the place of the last forward pass of any thread, for reports, and for a block that
        autograd calls again in a thread of its own.
    """

    spec: DiT
    threads: PerThread[ThreadState]
    names: tuple[str, ...]
    last: Place | None = None

    @property
    def state(self) -> ThreadState:
        return self.threads.state

    @property
    def place(self) -> Place | None:
        """The forward pass that this thread is in, or was in when autograd calls a block again."""
        # Another model may share blocks, and call them outside of this one's forward.
        inside = self.state.inside or torch.compiler.is_compiling()
        if not inside and torch._C._current_graph_task_id() < 0:
            return None
        return self.state.place or self.last

    def leave(self, model: nn.Module, args: Args, output: Any) -> None:
        self.state.inside = False

    @unless_removed
    def record_place(self, model: nn.Module, args: Args, kwargs: Given) -> tuple[Args, Given]:
        recorded, self.state.grids = self.state.grids, None
        check_cache(model)
        given = by_name(self.names, args, kwargs)
        timestep = given[self.spec.timestep]
        grids = recorded or self.spec.grids(model, given)
        grids = tuple((fixed(frames), fixed(h), fixed(w)) for frames, h, w in grids)
        place = Place(grids, timestep, self.state.stage)
        self.state.place = self.last = place
        self.state.inside = True
        if self.spec.kwargs:
            given[self.spec.kwargs] = place.add_to(given.get(self.spec.kwargs))
        return as_called(self.names, args, given)

    def append_place(self, rope: nn.Module, args: Args, output: Any) -> Any:
        if self.place is None:
            return output
        return self.place.add_to(output) if isinstance(output, dict) else (*output, self.place)


def as_called(names: tuple[str, ...], args: Args, given: Given) -> tuple[Args, Given]:
    """Arguments by position and by name, as the host passed them."""
    return tuple(given.pop(name) for name in names[: len(args)]), given
