"""The plugin's verbs: apply_patch, remove_patch, patched, report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from tomesd.patches import diffusers_unet
from tomesd.patches.common import Patch, Row
from tomesd.settings import diffusion_settings

Model = TypeVar("Model")

# Where a patched model keeps its Patch. A plain attribute, so that a deep copy has its own.
_PATCH = "_tomesd_patch"


def apply_patch(
    model: Model, ratio: float = 0.5, *, preset: str | None = None, **settings: Any
) -> Model:
    """Merge tokens in every supported model of a pipeline, from its next call on.

    >>> pipe = tomesd.apply_patch(pipe, ratio=0.5)

    model: a diffusers pipeline, or a UNet2DConditionModel or ControlNetModel, also one that is
        wrapped (by torch.compile, DistributedDataParallel). It is changed in place by forward
        hooks and returned; a model that is patched already gets the new settings instead of the
        old ones.
    ratio: share of the tokens to merge, 0 (changes nothing) to below 1; 0.5 by default, where the
        papers find the picture hardly changed at twice the speed.
    preset: "paper" is exactly ToMe's Appendix F. What is given beside it wins.
    settings: see `tomesd.DiffusionSettings`.

    Raises TypeError for a model that is not supported or an unknown setting, and ValueError for a
    setting out of its range or if nothing at all would be merged; the model is then unchanged.
    Source: ToMe, Appendix F; Token Merging for Fast Stable Diffusion.
    """
    chosen = diffusion_settings(ratio, preset, settings)
    targets = _targets(model)
    if not targets:
        raise TypeError(
            f"model must be or contain one of {', '.join(diffusers_unet.MODELS)}, "
            f"got {type(model).__name__}"
        )
    patches = [diffusers_unet.UNetPatch(target, chosen) for target in targets.values()]
    for target, patch in zip(targets.values(), patches, strict=True):
        _remove(target)
        patch.install()
        setattr(target, _PATCH, patch)
    _forget_compiled_code(model)
    return model


def remove_patch(model: Model) -> Model:
    """Undo apply_patch: the model is bit for bit what it was before.

    >>> pipe = tomesd.remove_patch(pipe)

    Returns what it was given. A model without a patch is left as it is.
    """
    removed = [_remove(target) for target in _targets(model).values()]
    if any(removed):
        _forget_compiled_code(model)
    return model


@contextmanager
def patched(model: Model, ratio: float = 0.5, **settings: Any) -> Iterator[Model]:
    """Merge tokens inside a `with` block only; undone on leaving it, also after an exception.

    >>> with tomesd.patched(pipe, ratio=0.5):
    ...     image = pipe(prompt).images[0]

    Takes what apply_patch takes. A patch that was there before comes back afterwards.
    """
    before = {
        name: getattr(target, _PATCH)
        for name, target in _targets(model).items()
        if hasattr(target, _PATCH)
    }
    apply_patch(model, ratio, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        for name, target in _targets(model).items():
            if name in before:
                before[name].install()
                setattr(target, _PATCH, before[name])


@dataclass(frozen=True)
class Report:
    """What merging does where; printing it gives a table. rows: by model's name."""

    rows: dict[str, list[Row]]

    def __str__(self) -> str:
        lines = []
        for name, rows in self.rows.items():
            lines.append(
                f"{name:<28} {'blocks':>6} {'tokens':>7} {'merged to':>9} {'attention saved':>15}"
            )
            for row in rows:
                lines.append(
                    f"  {row.where:<26} {row.blocks:>6} {row.tokens:>7} {row.merged:>9} "
                    f"{1 - row.work:>15.1%}  {row.note}".rstrip()
                )
            work = sum(row.blocks * row.tokens**2 for row in rows)
            left = sum(row.blocks * row.tokens**2 * row.work for row in rows)
            lines.append(f"  {'all':<51} {1 - left / max(work, 1):>15.1%}")
        return "\n".join(lines)


def report(model: Any) -> Report:
    """What is patched, what is not and why, and how much attention work is saved.

    >>> print(tomesd.report(pipe))

    Token counts are those of the last picture, before the first one those of the model's own size.
    "Attention saved" is the share of query–key pairs in self-attention that need not be computed.
    Raises ValueError if nothing in the model is patched.
    """
    found = {
        name: getattr(target, _PATCH).rows()
        for name, target in _targets(model).items()
        if hasattr(target, _PATCH)
    }
    if not found:
        raise ValueError(f"model must be patched, got a {type(model).__name__} without a patch")
    return Report(found)


def _targets(model: Any) -> dict[str, nn.Module]:
    """Every supported model inside a pipeline or module, by name."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    return {
        ".".join(filter(None, (part, name))) or type(module).__name__: module
        for part, root in parts.items()
        if isinstance(root, nn.Module)
        for name, module in root.named_modules()
        if any(base.__name__ in diffusers_unet.MODELS for base in type(module).__mro__)
    }


def _remove(target: nn.Module) -> bool:
    patch: Patch | None = target.__dict__.pop(_PATCH, None)
    if patch is not None:
        patch.remove()
    return patch is not None


def _forget_compiled_code(model: Any) -> None:
    """Let compiled models be compiled anew: by default they do not notice a change of hooks."""
    parts = [model] if isinstance(model, nn.Module) else getattr(model, "components", {}).values()
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
        torch.compiler.reset()
