"""What the patches of all families share."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle


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

    def rows(self) -> list[Row]:
        raise NotImplementedError(f"{type(self).__name__} does not report")

    def before(self, module: nn.Module, hook) -> None:
        """Call hook(module, args, kwargs) before each forward of the module."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook) -> None:
        """Call hook(module, args, output) after each forward of the module."""
        self.handles.append(module.register_forward_hook(hook))

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
