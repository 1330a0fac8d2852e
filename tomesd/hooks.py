"""What the patches of all families share."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Run = TypeVar("Run")


class Threads(threading.local, Generic[Run]):
    """What each thread is doing: threads that share a model do not mix their sizes and maps.

    make: makes what is kept for a thread, run. It is an object of its own, since a compiler loses
        what is written to a threading.local itself (torch 2.15).
    """

    def __init__(self, make: Callable[[], Run]):
        self.make = make
        self.run = make()

    def __reduce__(self) -> tuple:
        # A copied model starts anew: what threads are doing cannot be copied.
        return Threads, (self.make,)


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by their names, as far as these are told, in order."""
    # The compiler of torch 2.9 takes zip's strict=False for True.
    known = min(len(names), len(args))
    return dict(zip(names[:known], args[:known], strict=True)) | kwargs


class Row(NamedTuple):
    """One line of a report: a place in a model and what merging does there.

    tokens, merged: before and after, of the last picture or else of the model's own size; 0 if
        unknown. work: what the rest of self-attention costs, as a share. note: why nothing merges.
    """

    where: str
    blocks: int
    tokens: int
    merged: int
    work: float
    note: str = ""


@dataclass(eq=False)
class Patch:
    """The hooks on one model. Removing them leaves nothing behind."""

    handles: list[RemovableHandle] = field(default_factory=list)
    warned: bool = False

    def rows(self) -> list[Row]:
        raise NotImplementedError(f"{type(self).__name__} does not report")

    def before(self, module: nn.Module, hook) -> None:
        """Call hook(module, args, kwargs) before each forward of the module."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook, always: bool = False) -> None:
        """Call hook(module, args, output) after each forward of the module.

        always: also after one that failed, with None as output.
        """
        self.handles.append(module.register_forward_hook(hook, always_call=always))

    def why_idle(self) -> set[str]:
        """Why places that were to merge did not in the last forward; empty for those that did."""
        raise NotImplementedError(f"{type(self).__name__} always merges")

    def warn_if_idle(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After a forward in which nothing merged at all: say so, once."""
        if self.warned or torch.compiler.is_compiling():
            return
        reasons = self.why_idle()
        if "" not in reasons:
            self.warned = True
            why = "; ".join(sorted(reasons))
            warnings.warn(f"nothing merges in {type(model).__name__}: {why}", stacklevel=2)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def is_cached(*modules: Any) -> bool:
    """Whether one of diffusers' caches keeps something of a module from step to step.

    Its hooks are in the module itself, whoever applied them; offloading and casting keep nothing.
    """
    registries = (getattr(module, "_diffusers_hook", None) for module in modules)
    return any(
        hook._is_stateful for registry in registries if registry for hook in registry.hooks.values()
    )
