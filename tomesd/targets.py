"""What apply_patch patches in what it is given, and with which settings."""

import warnings
from numbers import Real
from typing import Any

from torch import nn

from tomesd import registry
from tomesd.diffusion import clones
from tomesd.diffusion.dit import DiT
from tomesd.diffusion.ratio_schedule import Ratio
from tomesd.diffusion.settings import DiffusionSettings, diffusion_settings
from tomesd.diffusion.unet import UNet
from tomesd.vit import ViT
from tomesd.vit.projectors import check_projectors
from tomesd.vit.settings import ViTSettings, vit_settings

# The arguments of apply_patch in tomesd 0.1.3 after the ratio, in order.
_OLD_ORDER = (
    *("max_downsample", "sx", "sy"),
    *("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"),
)

_DENOISER_PARTS = ("transformer", "unet", "prior", "decoder")


def modules_of(model: Any) -> dict[str, nn.Module]:
    """Every module of a pipeline or module, by name."""
    clone = clones.clone_of(model)
    model = model if clone is None else clone.model
    if isinstance(model, nn.Module):
        parts = {"": model}
    else:  # A pipeline of diffusers, or of transformers, which has one model.
        parts = getattr(model, "components", None) or {"": getattr(model, "model", None)}
    return {
        ".".join(filter(None, (part, name))) or type(module).__name__: module
        for part, root in parts.items()
        if isinstance(root, nn.Module)
        for name, module in root.named_modules()
    }


def settings_by_name(positional: tuple[Any, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those that are given by position as tomesd 0.1.3 takes them."""
    if len(positional) > len(_OLD_ORDER):
        raise TypeError(
            f"settings by position must be at most {', '.join(_OLD_ORDER)}, got {len(positional)}"
        )
    given = dict(zip(_OLD_ORDER, positional, strict=False))
    for name in given.keys() & settings.keys():
        raise TypeError(f"{name} must be given once, got it by position and by name")
    return given | settings


def choose(
    model: Any, ratio: Ratio | None, preset: str | None, settings: dict[str, Any]
) -> tuple[list[nn.Module], DiffusionSettings | ViTSettings]:
    """Which models to patch, and how: denoisers by ratio, Vision Transformers by r."""
    pipeline = "" if isinstance(model, nn.Module) else registry.why_refused(model)
    if pipeline:
        raise TypeError(pipeline)
    specs = {module: registry.find(module) for module in modules_of(model).values()}
    vits = [module for module, spec in specs.items() if isinstance(spec, ViT)]
    denoisers = [module for module, spec in specs.items() if isinstance(spec, UNet | DiT)]
    by_r = "r" in settings or "speedup" in settings
    # A pipeline may also have an image encoder, a Vision Transformer: its user means the denoiser.
    if not denoisers and (not vits or (_denoiser_part(model) is not None and not by_r)):
        raise TypeError(_why_unsupported(model))
    if not by_r and denoisers:
        ratio = 0.5 if ratio is None else ratio
        if preset is None and settings.keys() <= set(_OLD_ORDER):
            ratio = _capped(ratio, settings)
        if preset is None and not settings and isinstance(ratio, Real):
            preset = default_preset(model)
        return denoisers, diffusion_settings(ratio, preset, settings)
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
    chosen = vit_settings(settings)
    if not chosen.unmerge:
        check_projectors(modules_of(model).values())
    denoiser = _denoiser_part(model)
    if denoiser is not None:
        left = f"{type(denoiser).__name__}, its denoiser, is not patched"
        warnings.warn(f"r merges tokens only in the pipeline's {found}: {left}", stacklevel=3)
    return vits, chosen


def _capped(ratio: Ratio, settings: dict[str, Any]) -> Ratio:
    """The ratio of a call as tomesd 0.1.3 took it: of more than can merge, all that can."""
    most = diffusion_settings(0.0, None, settings).largest_ratio
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or not 0 < most < ratio <= 1:  # type: ignore[operator]
        return ratio
    why = f"ratio must be at most {most:.4g} with these sx and sy, got {ratio}"
    warnings.warn(f"{why}: {most:.4g} is used, as in tomesd 0.1.3", stacklevel=4)
    return most


def default_preset(model: Any) -> str:
    """What merges where neither a preset nor options say so.

    "late" for a pipeline whose one scheduler counts the steps of all its parts, else "steady".
    """
    parts = getattr(model, "components", {})
    counting = [name for name, part in parts.items() if hasattr(part, "timesteps")]
    return "late" if counting == ["scheduler"] else "steady"


def _denoiser_part(model: Any) -> nn.Module | None:
    """The denoiser of a pipeline, by the names that diffusers gives it."""
    parts = getattr(model, "components", {})
    found = (parts.get(name) for name in _DENOISER_PARTS)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def _why_unsupported(model: Any) -> str:
    modules, denoiser = modules_of(model), _denoiser_part(model)
    # A pipeline is told of its denoiser, whatever else it has.
    asked = modules.values() if denoiser is None else denoiser.modules()
    for reason in filter(None, map(registry.why_refused, asked)):
        return reason
    clone = clones.clone_of(model)
    if clone is not None:
        name = type(getattr(clone.model, "diffusion_model", clone.model)).__name__
        known = registry.supported()
        merge = sorted({"UNetModel", *known["comfy.ldm"], *known["backend"]})
        return f"model must have one of {', '.join(merge)}, got one with a {name}"
    model = model if denoiser is None else denoiser
    name = type(model).__name__
    if hasattr(model, "load_components") and not modules:
        return f"model must have its components loaded, got a {name} without any: load_components()"
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
