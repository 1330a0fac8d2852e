"""What the patches of all families share: hook handles and per-thread state."""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tomesd.reports import ReportRow

State = TypeVar("State")

# The attribute in which a patched model keeps its Patch. A plain attribute, so that a deep copy has
# its own.
PATCH = "_tomesd_patch"


class PerThread(threading.local, Generic[State]):
    """State of each thread: threads that share a model do not mix their token maps.

    >>> PerThread(list).state
    []

    make: makes a thread's state. It is an object of its own, since dynamo loses what is written to
        a threading.local itself (torch 2.15).
    """

    def __init__(self, make: Callable[[], State]):
        self.make = make
        self.state = make()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied model starts anew: what threads are doing cannot be copied.
        return PerThread, (self.make,)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The arguments of a module's class: offloading and caches replace a module's own forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name; positional ones are matched with `names` in order."""
    # Dynamo of torch 2.9 takes zip's strict=False for True.
    known = min(len(names), len(args))
    return dict(zip(names[:known], args[:known], strict=True)) | kwargs


def unless_removed(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A pre-hook on a model that another of its pre-hooks may remove while the model is called.

    PyTorch calls it once more all the same, but without arguments by name: it then does nothing.
    """

    @functools.wraps(hook)
    def call(owner: Any, model: nn.Module, args: Any, kwargs: Any = None) -> Any:
        return None if kwargs is None else hook(owner, model, args, kwargs)

    return call


class BlockTrace(NamedTuple):
    """What `tomesd.trace` records of a denoiser's block: see `TokenGroups`."""

    group: Tensor
    prefix: int
    grid: tuple[int, ...]

    @property
    def groups(self) -> Tensor:
        """Of the tokens on the grid: [B, *grid]."""
        return self.group[:, self.prefix :].reshape(-1, *self.grid)


@dataclass(eq=False)
class Patch:
    """The hooks on one model. Removing them leaves nothing behind."""

    handles: list[RemovableHandle] = field(default_factory=list)
    warned: bool = False

    def install(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no hooks")

    def rows(self) -> list[ReportRow]:
        raise NotImplementedError(f"{type(self).__name__} does not report")

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call hook(module, args, kwargs) before each forward of the module."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        """Call hook(module, args, output) after each forward of the module.

        always: even if the forward raised; output is then None.
        """
        self.handles.append(module.register_forward_hook(hook, always_call=always))

    def why_idle(self) -> set[str]:
        """Why blocks that should merge did not in the last forward; empty for those that did."""
        raise NotImplementedError(f"{type(self).__name__} always merges")

    def warn_if_idle(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Warn once after a forward in which nothing merged at all."""
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


class DenoiserPatch(Patch):
    """A patch whose blocks merge and unmerge by themselves, one token map for each.

    blocks: the hooks of each block that merges.
    """

    blocks: dict[nn.Module, Any]

    def all_blocks(self) -> list[nn.Module]:
        """Every block that could merge, with these settings or others."""
        raise NotImplementedError(f"{type(self).__name__} has no blocks")

    def traced(self, block: nn.Module) -> BlockTrace | None:
        """What the block that this thread is running merges; None if nothing."""
        raise NotImplementedError(f"{type(self).__name__} has no blocks")
