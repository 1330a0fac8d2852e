"""Whose code computes attention: the host's own, which is known, or a processor of somebody else.

Diffusers' own processors let each token attend to its own sample and add a bias to the logits.
Others may take keys from another sample or from another pass, so their keys and values are
unmerged: each then counts as often as its group has tokens, wherever it goes, without a bias.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tomesd.diffusion.conflicts import fused_projections_error
from tomesd.hooks import Patch, PerThread

# Processors that keep the attention of tokens to each other, which is then read as squares.
_RECORDERS = {"CrossAttnStoreProcessor"}

# Packages that wrap a module's forward and call it: offloading, caches, casts.
_WRAPPERS = {"accelerate", "diffusers", "torch"}


def is_perturbed(attention: Any) -> bool:
    """Whether it is for perturbed-attention guidance: the last samples attend to nobody else."""
    return type(attention.processor).__name__.startswith("PAG")


def attending(attention: Any, batch: int) -> int:
    """How many samples attend to others' tokens: of the last ones, each attends to itself alone."""
    if not is_perturbed(attention):
        return batch
    return batch * 2 // 3 if "CFG" in type(attention.processor).__name__ else batch // 2


def is_stock(attention: Any) -> bool:
    """Whether the host's own code computes this attention; also if there is none.

    The pipelines of diffusers have processors that are not its models' own.
    """
    processor = getattr(attention, "processor", None)
    if processor is None or is_perturbed(attention):
        return True
    return not _is_replaced(attention) and _is_of_host(type(attention), type(processor))


def why_whole(attention: Any, keys_only: bool) -> str:
    """Why a block with this self-attention does not merge; empty if it may.

    keys_only: whether its merged keys are given to it beside its queries.
    """
    if is_stock(attention):
        return ""
    name = type(attention.processor).__name__
    if name in _RECORDERS:
        return f"{name} keeps maps of all tokens"
    if _is_replaced(attention):
        return "the forward of its attention was replaced"
    return f"{name} would take merged keys for those of a text" if keys_only else ""


def explain(attentions: list[Any], before: int, after: int) -> None:
    """Note at the error that a block is raising what a processor should know of merging."""
    error = sys.exc_info()[1]
    others = [each for each in attentions if not is_stock(each)]
    names = sorted({type(each.processor).__name__ for each in others})
    if error is not None and names:
        error.add_note(
            f"This block ran on {after} of its {before} tokens, since tokens merge, and "
            f"{', '.join(names)} computes its attention. A processor that takes the tokens for a "
            "grid, or their number for that of the image, needs all of them: remove_patch, or "
            "leave this level unmerged."
        )


def _is_replaced(attention: Any) -> bool:
    """Whether somebody put another forward in place of that of its class."""
    forward = None if torch.compiler.is_compiling() else vars(attention).get("forward")
    if forward is None:
        return False
    module = getattr(inspect.unwrap(forward), "__module__", None) or ""
    home = type(attention).__module__.partition(".")[0]
    return module.partition(".")[0] not in _WRAPPERS | {home}


def _is_of_host(attention: type, processor: type) -> bool:
    """Whether the package of an attention has the code of a processor; but not in its pipelines."""
    call: Any = processor.__call__
    if call is nn.Module.__call__:
        call = processor.forward  # type: ignore[attr-defined]
    module = getattr(call, "__module__", None) or ""
    home = attention.__module__.partition(".")[0]
    return module.partition(".")[0] == home and not module.startswith("diffusers.pipelines.")


# What torch.compiler.assume_constant_result does, which would import all of the compiler.
setattr(_is_of_host, "_dynamo_marked_constant", True)  # noqa: B010


@dataclass(eq=False)
class KeyProjections:
    """Keeps hooks that unmerge keys and values on the projections that an attention has now.

    Loading or unloading a LoRA adapter replaces them by other modules.

    unmerge: of the attention, what a projection was given and what it gave.
    used: those that the attention has used since it began. Perturbed-attention guidance uses them
        first for the samples that attend, then for those of which each token attends to itself
        alone, which need no keys of others.
    """

    patch: Patch
    attention: Any
    names: tuple[str, ...]
    unmerge: Callable[[Any, Tensor, Tensor], Tensor]
    used: PerThread[set[nn.Module]] = field(default_factory=lambda: PerThread(set))
    hooked: dict[str, tuple[nn.Module, RemovableHandle]] = field(default_factory=dict)

    def follow(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(attention, "fused_projections", False):
            raise fused_projections_error("prop_attn", True)
        for name in self.names:
            projection = getattr(attention, name)
            self.used.state.discard(projection)
            before, handle = self.hooked.get(name, (None, None))
            if projection is not before:
                if handle is not None:
                    handle.remove()
                self.patch.after(projection, self._unmerge)
                self.hooked[name] = projection, self.patch.handles[-1]

    def _unmerge(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if is_perturbed(self.attention):
            if projection in self.used.state:
                return output
            self.used.state.add(projection)
        return self.unmerge(self.attention, args[0], output)


def foreign_keys_error(attention: Any, tokens: Tensor, given: Tensor) -> ValueError:
    """What to raise where keys are projected from other tokens than attention was given."""
    name = type(attention.processor).__name__
    return ValueError(
        f"{name} must project keys from the tokens that attention is given while tokens merge, "
        f"{list(tokens.shape)}, got others, {list(given.shape)}, whose group sizes are unknown: "
        "remove_patch, or give all keys the same weight, apply_patch(..., prop_attn=False)"
    )
