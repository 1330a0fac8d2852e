"""The plugin's verbs: apply_patch, remove_patch, patched, report."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

import tomesd.diffusion.dit.families  # noqa: F401 - registers them
from tomesd import registry
from tomesd.diffusion.dit import DiT, DiTPatch
from tomesd.diffusion.ratio_schedule import Ratio
from tomesd.diffusion.settings import DiffusionSettings, diffusion_settings
from tomesd.diffusion.unet import UNet, UNetPatch
from tomesd.hooks import PATCH, Patch
from tomesd.reports import Report, ReportRow
from tomesd.vit import ViT, ViTPatch
from tomesd.vit.settings import ViTSettings, vit_settings

Model = TypeVar("Model")

# How models of each kind of spec are patched.
_PATCHES: dict[type, Callable[..., Patch]] = {UNet: UNetPatch, DiT: DiTPatch, ViT: ViTPatch}

_DENOISER_PARTS = ("transformer", "unet", "prior", "decoder")

# The releases of each host that the tests pass with.
_TESTED = {
    "diffusers": "0.36 to 0.42",
    "transformers": "5.9 to 5.24, for DINOv2 5.20 to 5.24",
    "timm": "1.0.22 to 1.0.31",
    "torchvision": "0.24 to 0.29",
}


def apply_patch(
    model: Model, ratio: Ratio | None = None, *, preset: str | None = None, **settings: Any
) -> Model:
    """Merge tokens in every supported model of a pipeline or module, from its next call on.

    >>> pipe = tomesd.apply_patch(pipe, ratio=0.5)
    >>> vit = tomesd.apply_patch(vit, r=4)

    model: a diffusers pipeline; a UNet, ControlNet or diffusion transformer of diffusers; or a
        Vision Transformer of transformers, timm or torchvision (`tomesd.supported`), also one that
        is wrapped (by torch.compile, DistributedDataParallel). It is changed in place by forward
        hooks and returned. A model that is patched already gets the new settings instead.
    ratio: for denoisers, the share of the tokens to merge, from 0 (changes nothing) to below 1; 0.5
        by default, as in the papers. How much faster that is depends on the model and the size of
        the image (docs/performance.md). Or a `tomesd.RatioSchedule` or a function of progress, for
        a ratio that changes over the steps of a pipeline; or, for a UNet, a dict of any of these by
        level, {1: 0.5, 2: 0.25}, where a level is given by how much coarser it is than the finest
        one with attention. Other levels do not merge.
    preset: for denoisers, a named set of options: "quality" merges keys and values only, "fast"
        whole blocks at every level where it pays, "late" the same in a pipeline, but not in the
        first fifth of the steps, which is closer to the unpatched image for the work that it saves
        (docs/results.md), "paper" is exactly ToMe's Appendix F. Options that are given override it.
    settings: for denoisers, see `tomesd.DiffusionSettings`. For Vision Transformers, see
        `tomesd.ViTSettings`: r, the number of tokens to merge in each layer, or speedup is
        required, and denoisers are then left as they are.

    Code that torch.compile has compiled so far is discarded, for all models: it would not notice
    new hooks.
    Raises TypeError for a model that is not supported, or whose release has other parts than the
    tested ones, or for an unknown setting; ValueError for a setting out of range or if nothing at
    all would be merged. The model is then unchanged.
    Source: ToMe; its Appendix F; Token Merging for Fast Stable Diffusion.
    """
    targets, chosen = _choose(model, ratio, preset, settings)
    patches = []
    for target in targets:
        spec = registry.find(target)
        try:
            patches.append(_PATCHES[type(spec)](spec, target, chosen, model))
        except (AttributeError, KeyError) as error:
            raise TypeError(_why_changed(target, error)) from error
    for target, patch in zip(targets, patches, strict=True):
        _remove(target)
        patch.install()
        setattr(target, PATCH, patch)
    _forget_compiled_code()
    return model


def remove_patch(model: Model) -> Model:
    """Undo apply_patch: the model is bit for bit what it was before.

    >>> pipe = tomesd.remove_patch(pipe)

    Returns the model. A model without a patch is left as it is.
    """
    patched = patched_modules(model)
    for target in patched.values():
        _remove(target)
    if patched:
        _forget_compiled_code()
    return model


@contextmanager
def patched(
    model: Model, ratio: Ratio | None = None, *, preset: str | None = None, **settings: Any
) -> Iterator[Model]:
    """Merge tokens inside a `with` block only; undone on leaving it, also after an exception.

    >>> with tomesd.patched(pipe, ratio=0.5):
    ...     image = pipe(prompt).images[0]

    Takes what apply_patch takes. A patch that was there before comes back afterwards.
    """
    before = [(target, getattr(target, PATCH)) for target in patched_modules(model).values()]
    apply_patch(model, ratio, preset=preset, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        for target, patch in before:
            patch.install()
            setattr(target, PATCH, patch)


def report(model: Any) -> Report:
    """What is patched, what is not and why, and how much attention work is saved.

    >>> print(tomesd.report(pipe))

    Token counts are those of the last image, before the first one those of the model's own size.
    "Attention saved" is the share of query–key pairs in self-attention that need not be computed.
    Raises ValueError if nothing in the model is patched.
    """
    patched = patched_modules(model)
    if not patched:
        raise not_patched_error(model)
    found = {name: _rows(target) for name, target in patched.items()}
    if not any(isinstance(getattr(each, PATCH), ViTPatch) for each in patched.values()):
        later = [ReportRow("all of it", 0, 0, 0, 1.0, "not patched: it came later")]
        others = {name: each for name, each in _modules(model).items() if name not in patched}
        found |= {n: later for n, m in others.items() if isinstance(registry.find(m), UNet | DiT)}
    return Report(found)


def _rows(target: nn.Module) -> list[ReportRow]:
    """The rows of one patched model."""
    patch = getattr(target, PATCH)
    gone = set(getattr(patch, "blocks", ())) - set(target.modules())
    note = "replaced since: apply_patch again to merge in the new ones"
    rows: list[ReportRow] = patch.rows()
    return rows + [ReportRow("blocks", len(gone), 0, 0, 1.0, note)] * bool(gone)


def patched_modules(model: Any) -> dict[str, nn.Module]:
    """Every patched module of a pipeline or module, by name."""
    return {name: module for name, module in _modules(model).items() if PATCH in module.__dict__}


def not_patched_error(model: Any) -> ValueError:
    return ValueError(
        f"model must be patched, got a {type(model).__name__} without a patch: call apply_patch on "
        "it, also if the part that was patched has been replaced"
    )


def _modules(model: Any) -> dict[str, nn.Module]:
    """Every module of a pipeline or module, by name."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    return {
        ".".join(filter(None, (part, name))) or type(module).__name__: module
        for part, root in parts.items()
        if isinstance(root, nn.Module)
        for name, module in root.named_modules()
    }


def _choose(
    model: Any, ratio: Ratio | None, preset: str | None, settings: dict[str, Any]
) -> tuple[list[nn.Module], DiffusionSettings | ViTSettings]:
    """Which models to patch, and how: denoisers by ratio, Vision Transformers by r."""
    pipeline = "" if isinstance(model, nn.Module) else registry.why_refused(model)
    if pipeline:
        raise TypeError(pipeline)
    specs = {module: registry.find(module) for module in _modules(model).values()}
    vits = [module for module, spec in specs.items() if isinstance(spec, ViT)]
    denoisers = [module for module, spec in specs.items() if isinstance(spec, UNet | DiT)]
    by_r = "r" in settings or "speedup" in settings
    # A pipeline may also have an image encoder, a Vision Transformer: its user means the denoiser.
    if not denoisers and (not vits or (_denoiser_part(model) is not None and not by_r)):
        raise TypeError(_why_unsupported(model))
    if not by_r and denoisers:
        return denoisers, diffusion_settings(0.5 if ratio is None else ratio, preset, settings)
    found = type((vits or denoisers)[0]).__name__
    if not vits:
        raise TypeError(
            f"{found} must be given ratio, the share of its tokens to merge (for example "
            "ratio=0.5); r and speedup are for Vision Transformers"
        )
    if ratio is not None or preset is not None:
        raise TypeError(
            f"{found} must be given r, the number of tokens to merge in each layer (for example "
            "r=8); ratio and preset are for diffusion models"
        )
    denoiser = _denoiser_part(model)
    if denoiser is not None:
        left = f"{type(denoiser).__name__}, its denoiser, is left as it is"
        warnings.warn(f"r merges tokens in {found} of the pipeline alone: {left}", stacklevel=3)
    return vits, vit_settings(settings)


def _denoiser_part(model: Any) -> nn.Module | None:
    """The denoiser of a pipeline, by the names that diffusers gives it."""
    parts = getattr(model, "components", {})
    found = (parts.get(name) for name in _DENOISER_PARTS)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def _why_unsupported(model: Any) -> str:
    modules, denoiser = _modules(model), _denoiser_part(model)
    # A pipeline is told of its denoiser, whatever else it has.
    asked = modules.values() if denoiser is None else denoiser.modules()
    for reason in filter(None, map(registry.why_refused, asked)):
        return reason
    model = model if denoiser is None else denoiser
    name = type(model).__name__
    if hasattr(model, "load_components") and not modules:
        return f"model must have its parts, got a {name} without any: call its load_components()"
    if not modules:
        return (
            "model must be a diffusers pipeline or a torch module, got "
            f"{repr(model)[:60] if isinstance(model, str | type | None) else f'a {name}'}"
        )
    close = registry.close_names(model)
    similar = f" The closest supported ones are {', '.join(close)}." if close else ""
    return (
        f"model must be or contain a class of tomesd.supported(), got {name}.{similar} "
        "docs/adding-a-model.md shows how to register another one"
    )


def _why_changed(target: nn.Module, error: Exception) -> str:
    """What to say of a model whose parts differ from those of its class in the tested releases."""
    host, name = registry.host_of(target), type(target).__name__
    release = getattr(sys.modules.get(host), "__version__", "of an unknown release")
    tested = f" {_TESTED[host]}" if host in _TESTED else ""
    return (
        f"model must be a {name} with the parts that it has in {host}{tested}, got one from {host} "
        f"{release}: {error}"
    )


def _remove(target: nn.Module) -> None:
    patch: Patch | None = target.__dict__.pop(PATCH, None)
    if patch is not None:
        patch.remove()


def _forget_compiled_code() -> None:
    """Discard all compiled code: by default, it does not notice new hooks.

    Whether code that was compiled elsewhere calls this model cannot be known.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
