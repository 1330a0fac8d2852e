"""The plugin's verbs: apply_patch, remove_patch, patched, report."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

import tomesd.diffusion.dit.families  # noqa: F401 - registers them
from tomesd import registry
from tomesd.diffusion import clones
from tomesd.diffusion.dit import DiT, DiTPatch
from tomesd.diffusion.ratio_schedule import Ratio
from tomesd.diffusion.unet import LDMPatch, LDMUNet, UNet, UNetPatch
from tomesd.hooks import PATCH, Patch
from tomesd.registry import register, supported
from tomesd.reports import Report, ReportRow
from tomesd.targets import choose, modules_of, settings_by_name
from tomesd.vit import ViT, ViTPatch

__all__ = ["apply_patch", "patched", "register", "remove_patch", "report", "supported"]

Model = TypeVar("Model")

# How models of each kind of spec are patched.
_PATCHES: dict[type, Callable[..., Patch]] = {
    UNet: UNetPatch,
    LDMUNet: LDMPatch,
    DiT: DiTPatch,
    ViT: ViTPatch,
}

# The releases of each host that the tests pass with.
_TESTED = {
    "diffusers": "0.36 to 0.42",
    "transformers": "5.9 to 5.24, for DINOv2 5.20 to 5.24",
    "timm": "1.0.22 to 1.0.31",
    "torchvision": "0.24 to 0.29",
}


def apply_patch(
    model: Model,
    ratio: Ratio | None = None,
    *positional: Any,
    preset: str | None = None,
    **settings: Any,
) -> Model:
    """Merge tokens in every supported model of a pipeline or module, from the next call on.

    >>> pipe = tomesd.apply_patch(pipe, ratio=0.5)
    >>> vit = tomesd.apply_patch(vit, r=4)

    model: a pipeline of diffusers or transformers; a UNet, ControlNet or diffusion transformer of
        diffusers; the original UNet (ldm, sgm and their copies) or a model that contains it; a
        ModelPatcher of ComfyUI or Forge, of which only that clone is patched; or a Vision
        Transformer of transformers, timm or torchvision (`tomesd.supported`). Models may be wrapped
        (by torch.compile, DistributedDataParallel). The model is changed in place, by forward
        hooks, and returned. Patching again replaces the settings.
    ratio: for denoisers, the share of the tokens to merge, from 0 (changes nothing) to below 1; 0.5
        by default, as in the papers. The speed-up depends on the model and the image size
        (docs/performance.md). Or a `tomesd.RatioSchedule` or a function of progress, for a ratio
        that changes over the steps of a pipeline; or, for a UNet, a dict of any of these by level,
        {1: 0.5, 2: 0.25}, where a level is named by how much coarser it is than the finest one
        with attention; or, for every denoiser, a dict by the name of the block, as
        `tomesd.calibrate` finds it. Other levels or blocks do not merge.
    preset: for denoisers, a named set of options: "quality" merges keys and values only, "fast"
        whole blocks at every level where it pays, "late" the same but not in the first fifth of a
        pipeline's steps, and always at the finest level, "steady" whole blocks at the finest level
        in every step, and "paper" is exactly ToMe's Appendix F. Options given with a preset
        override it. Without a preset, options or a ratio that changes, a pipeline whose one
        scheduler counts its steps gets "late", which is closest to the unpatched image for the time
        saved (docs/results.md); compiled, it is two graphs. Everything else gets "steady".
    positional: the positional arguments of tomesd 0.1.3 after the ratio, so that its calls still
        run: max_downsample, sx, sy, use_rand, merge_attn, merge_crossattn and merge_mlp.
    settings: for denoisers, see `tomesd.DiffusionSettings`. For Vision Transformers, see
        `tomesd.ViTSettings`: r, the number of tokens to merge in each layer, or speedup is
        required, and denoisers are then not patched.

    All code compiled by torch.compile so far is discarded, for all models: it would not notice new
    hooks.
    Raises TypeError for an unsupported model, a model whose parts differ from the tested releases,
    or an unknown setting; ValueError for a setting out of range or if nothing would merge. The
    model is then unchanged.
    Source: ToMe; its Appendix F; Token Merging for Fast Stable Diffusion.
    """
    settings = settings_by_name(positional, settings)
    targets, chosen = choose(model, ratio, preset, settings)
    clone = clones.clone_of(model)
    follower = None if clone is None else clones.Follower()
    patches: dict[nn.Module, Any] = {}
    for target in targets:
        spec = registry.find(target)
        try:
            patches[target] = _PATCHES[type(spec)](spec, target, chosen, follower or model)
        except (AttributeError, KeyError) as error:
            raise TypeError(_why_changed(target, error)) from error
    if follower is not None:
        follower.patches = patches
        clones.follow(clone, follower)
        return model
    for target, patch in patches.items():
        _remove(target)
        patch.install()
        setattr(target, PATCH, patch)
    _forget_compiled_code()
    return model


def remove_patch(model: Model) -> Model:
    """Undo apply_patch: the model is bit for bit what it was before.

    >>> pipe = tomesd.remove_patch(pipe)

    Returns the model. A model without a patch is not changed.
    """
    clone = clones.clone_of(model)
    if clone is not None:
        clones.leave(clone)
        return model
    patched = patches_of(model)
    for target, _ in patched.values():
        _remove(target)
    if patched:
        _forget_compiled_code()
    return model


@contextmanager
def patched(
    model: Model, ratio: Ratio | None = None, *, preset: str | None = None, **settings: Any
) -> Iterator[Model]:
    """Merge tokens only inside a `with` block; undone on leaving it, also after an exception.

    >>> with tomesd.patched(pipe, ratio=0.5):
    ...     image = pipe(prompt).images[0]

    Takes the arguments of apply_patch. An earlier patch is restored afterwards.
    """
    clone = clones.clone_of(model)
    follower = None if clone is None else clones.follower_of(clone)
    before = list(patches_of(model).values())
    apply_patch(model, ratio, preset=preset, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        if follower is not None:
            clones.follow(clone, follower)
        else:
            for target, patch in before:
                patch.install()
                setattr(target, PATCH, patch)


def report(model: Any) -> Report:
    """What is patched, what is not and why, and how much attention work is saved.

    >>> print(tomesd.report(pipe))

    Token counts are those of the last image; before the first one, those of the model's own size.
    "Attention saved" is the share of query–key pairs in self-attention that are not computed.
    Raises ValueError if nothing in the model is patched.
    """
    patched = patches_of(model)
    if not patched:
        raise not_patched_error(model)
    found = {name: _rows(target, patch) for name, (target, patch) in patched.items()}
    if not any(isinstance(patch, ViTPatch) for _, patch in patched.values()):
        later = [ReportRow("all of it", 0, 0, 0, 1.0, "not patched: it was added later")]
        others = {name: each for name, each in modules_of(model).items() if name not in patched}
        found |= {n: later for n, m in others.items() if isinstance(registry.find(m), UNet | DiT)}
    return Report(found)


def patches_of(model: Any) -> dict[str, tuple[nn.Module, Any]]:
    """Every patched module of a pipeline, module or clone, with its patch, by name."""
    clone = clones.clone_of(model)
    follower = None if clone is None else clones.follower_of(clone)
    patches = {} if follower is None else follower.patches
    return {
        name: (module, patches.get(module) or module.__dict__[PATCH])
        for name, module in modules_of(model).items()
        if module in patches or (clone is None and PATCH in module.__dict__)
    }


def _rows(target: nn.Module, patch: Any) -> list[ReportRow]:
    """The rows of one patched model."""
    gone = set(getattr(patch, "blocks", ())) - set(target.modules())
    note = "replaced since: call apply_patch again to merge in the new ones"
    rows: list[ReportRow] = patch.rows()
    return rows + [ReportRow("blocks", len(gone), 0, 0, 1.0, note)] * bool(gone)


def not_patched_error(model: Any) -> ValueError:
    return ValueError(
        f"model must be patched, got a {type(model).__name__} without a patch: call apply_patch on "
        "it, again if the patched part has been replaced"
    )


def _why_changed(target: nn.Module, error: Exception) -> str:
    """What to say of a model whose parts differ from those of its class in the tested releases."""
    host, name = registry.host_of(target), type(target).__name__
    release = getattr(sys.modules.get(host), "__version__", "of an unknown release")
    tested = f" {_TESTED[host]}" if host in _TESTED else ""
    return (
        f"model must be a {name} with the same parts as in {host}{tested}, got one from {host} "
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
