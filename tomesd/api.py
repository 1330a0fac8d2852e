"""The plugin's verbs: apply_patch, remove_patch, patched, report."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from tomesd.diffusion.dit.families import cross as diffusers_transformer_cross
from tomesd.diffusion.dit.families import flux as diffusers_transformer_flux
from tomesd.diffusion.dit.families import hunyuan as diffusers_transformer_hunyuan
from tomesd.diffusion.dit.families import joint as diffusers_transformer_joint
from tomesd.diffusion.dit.families import other as diffusers_transformer_other
from tomesd.diffusion.dit.families import single as diffusers_transformer_single
from tomesd.diffusion.dit.patch import TransformerPatch
from tomesd.diffusion.ratio_schedule import Ratio, RatioPlan
from tomesd.diffusion.settings import diffusion_settings
from tomesd.diffusion.unet import levels as diffusers_unet_places
from tomesd.diffusion.unet import patch as diffusers_unet
from tomesd.hooks import Patch, Row
from tomesd.vit import timm as timm_vit
from tomesd.vit import torchvision as torchvision_vit
from tomesd.vit import transformers as transformers_vit
from tomesd.vit import videomae as transformers_videomae
from tomesd.vit.settings import vit_settings

Model = TypeVar("Model")

# Where a patched model keeps its Patch. A plain attribute, so that a deep copy has its own.
_PATCH = "_tomesd_patch"


class _Family(NamedTuple):
    """Models are known by the names of their classes, so that no host has to be imported.

    host: the package. models: what can be patched. refused: what cannot, and why.
    """

    host: str
    models: tuple[str, ...]
    refused: dict[str, str]
    make_patch: Any


_TRANSFORMERS = (
    diffusers_transformer_joint,
    diffusers_transformer_flux,
    diffusers_transformer_hunyuan,
    diffusers_transformer_single,
    diffusers_transformer_cross,
    diffusers_transformer_other,
)
_DENOISERS = (
    _Family(
        "diffusers",
        diffusers_unet_places.MODELS,
        diffusers_unet_places.REFUSED,
        diffusers_unet.UNetPatch,
    ),
    *(
        _Family("diffusers", family.models, {}, partial(TransformerPatch, family))
        for kind in _TRANSFORMERS
        for family in kind.FAMILIES
    ),
    *(_Family("diffusers", (), kind.REFUSED, None) for kind in _TRANSFORMERS),
)
_VITS = (
    _Family(
        "transformers",
        transformers_vit.MODELS,
        transformers_vit.REFUSED,
        transformers_vit.TransformersViTPatch,
    ),
    _Family("transformers", transformers_videomae.MODELS, {}, transformers_videomae.VideoMAEPatch),
    _Family("timm", timm_vit.MODELS, timm_vit.REFUSED, timm_vit.TimmViTPatch),
    _Family(
        "torchvision",
        torchvision_vit.MODELS,
        torchvision_vit.REFUSED,
        torchvision_vit.TorchvisionViTPatch,
    ),
)

# The releases of each host with which the tests passed.
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
    >>> vit = tomesd.apply_patch(vit, r=8)

    model: a diffusers pipeline, a UNet, ControlNet or diffusion transformer of diffusers, or a
        Vision Transformer of transformers, timm or torchvision (`tomesd.supported`), also one that
        is wrapped (by torch.compile, DistributedDataParallel). It is changed in place by forward
        hooks and returned; a model that is patched already gets the new settings instead of the
        old ones.
    ratio: for denoisers, the share of the tokens to merge, 0 (changes nothing) to below 1; 0.5 by
        default, as in the papers. How much faster that is depends on the model and the size of the
        picture (`docs/performance.md`). Or a
        `tomesd.RatioSchedule` or a function of progress, for a ratio that changes over the steps of
        a pipeline; or, for a UNet, a dict of any of these by level, {1: 0.5, 2: 0.25}: by how much
        coarser a level is than the finest one with attention. It merges at those and no others.
    preset: for denoisers, settings under one name: "quality" merges keys and values only, "fast"
        whole blocks at every level where it pays, "paper" is exactly ToMe's Appendix F. What is
        given beside it wins.
    settings: for denoisers, see `tomesd.DiffusionSettings`. For Vision Transformers, see
        `tomesd.ViTSettings`: r, the number of tokens to merge in each layer, or speedup must be
        given, and where it is, denoisers are left as they are.

    What torch.compile made so far is forgotten, also of other models: it would not notice hooks.
    Raises TypeError for a model that is not supported, or of a release in which it has other parts
    than are known, or for an unknown setting, and ValueError for a setting out of its range or if
    nothing at all would be merged; the model is then unchanged.
    Source: ToMe; its Appendix F; Token Merging for Fast Stable Diffusion.
    """
    targets, chosen = _choose(model, ratio, preset, settings)
    patches = []
    for target, family in targets:
        try:
            patches.append(family.make_patch(target, *chosen))
        except (AttributeError, KeyError) as error:
            raise TypeError(_why_changed(target, family, error)) from error
    for (target, _), patch in zip(targets, patches, strict=True):
        _remove(target)
        patch.install()
        setattr(target, _PATCH, patch)
    _forget_compiled_code()
    return model


def remove_patch(model: Model) -> Model:
    """Undo apply_patch: the model is bit for bit what it was before.

    >>> pipe = tomesd.remove_patch(pipe)

    Returns what it was given. A model without a patch is left as it is.
    """
    patched = _patched(model)
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
    before = [(target, getattr(target, _PATCH)) for target in _patched(model).values()]
    apply_patch(model, ratio, preset=preset, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        for target, patch in before:
            patch.install()
            setattr(target, _PATCH, patch)


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
    found = {name: getattr(target, _PATCH).rows() for name, target in _patched(model).items()}
    if not found:
        raise ValueError(f"model must be patched, got a {type(model).__name__} without a patch")
    return Report(found)


def supported() -> dict[str, tuple[str, ...]]:
    """The classes of models that apply_patch takes, by the package that defines them.

    >>> "FluxTransformer2DModel" in tomesd.supported()["diffusers"]
    True

    A model of a class that inherits from one of them is supported too, and so is a pipeline that
    has one. docs/adding-a-model.md shows how to add one.
    """
    found: dict[str, tuple[str, ...]] = {}
    for family in (*_DENOISERS, *_VITS):
        found[family.host] = found.get(family.host, ()) + family.models
    return found


def _modules(model: Any) -> dict[str, nn.Module]:
    """Every module of a pipeline or module, by name."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    return {
        ".".join(filter(None, (part, name))) or type(module).__name__: module
        for part, root in parts.items()
        if isinstance(root, nn.Module)
        for name, module in root.named_modules()
    }


def _patched(model: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in _modules(model).items() if _PATCH in module.__dict__}


def _classes(module: nn.Module, host: str) -> set[str]:
    """The names of the module's classes, its own and inherited, that the host defines."""
    bases = type(module).__mro__
    return {base.__name__ for base in bases if base.__module__.partition(".")[0] == host}


def _targets(model: Any, families: tuple[_Family, ...]) -> list[tuple[nn.Module, _Family]]:
    return [
        (module, family)
        for module in _modules(model).values()
        for family in families
        if _classes(module, family.host) & set(family.models)
    ]


def _choose(model: Any, ratio: Ratio | None, preset: str | None, settings: dict) -> tuple:
    """Which models to patch, and how: denoisers by ratio, Vision Transformers by r."""
    denoisers, vits = _targets(model, _DENOISERS), _targets(model, _VITS)
    if not denoisers and not vits:
        raise TypeError(_why_unsupported(model))
    by_r = "r" in settings or "speedup" in settings
    if not by_r and denoisers:
        plan = RatioPlan(0.5 if ratio is None else ratio, model)
        return denoisers, (diffusion_settings(max(plan.ratios), preset, settings), plan)
    found = type((vits or denoisers)[0][0]).__name__
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
    return vits, (vit_settings(settings),)


def _why_unsupported(model: Any) -> str:
    for module in _modules(model).values():
        for family in (*_DENOISERS, *_VITS):
            for name in _classes(module, family.host) & set(family.refused):
                return f"model must not be a {name}: {family.refused[name]}"
    if hasattr(model, "load_components") and not _modules(model):
        return (
            f"model must have its parts, got a {type(model).__name__} without any: call its "
            "load_components() first"
        )
    names = [f"{name} ({host})" for host, models in supported().items() for name in models]
    return f"model must be or contain one of {', '.join(names)}, got {type(model).__name__}"


def _why_changed(target: nn.Module, family: _Family, error: Exception) -> str:
    """What to say of a model that has other parts than its class had in the tested releases."""
    host, name = family.host, type(target).__name__
    release = getattr(sys.modules.get(host), "__version__", "of an unknown release")
    return (
        f"model must be a {name} with the parts that it has in {host} {_TESTED[host]}, got one "
        f"from {host} {release}: {error}"
    )


def _remove(target: nn.Module) -> None:
    patch: Patch | None = target.__dict__.pop(_PATCH, None)
    if patch is not None:
        patch.remove()


def _forget_compiled_code() -> None:
    """Let everything be compiled anew: by default, compiled code does not notice new hooks.

    Whether code that was compiled from elsewhere calls this model cannot be known.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
