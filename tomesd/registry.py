"""Which classes of models merge and how, and which do not and why.

Models are known by the package and name of their class, so no host has to be imported.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn


class Spec:
    """How models of some class are hooked; each kind of model has its own subclass."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        # Patched models are copied and pickled with their spec, whose functions cannot be.
        for host, entries in _entries.items():
            for name, spec in entries.items():
                if spec is self:
                    return _entry, (host, name)
        return super().__reduce__()


@dataclass(frozen=True)
class _Refusal(Spec):
    reason: str


_entries: dict[str, dict[str, Spec]] = defaultdict(dict)  # By host and class.


def _entry(host: str, name: str) -> Spec:
    return _entries[host][name]


def register(spec: Spec, *models: str | type[nn.Module]) -> None:
    """Let `apply_patch` take models of these classes, and of classes that inherit from them.

    >>> from tomesd.diffusion.unet import UNet
    >>> tomesd.register(UNet(), "my_package.MyUNet")

    spec: how they are hooked: a `tomesd.diffusion.unet.UNet`, `tomesd.diffusion.dit.DiT` or
        `tomesd.vit.ViT`.
    models: "package.Class", where package defines the class, or the class itself; "*.Class" for one
        that many packages have copied. The top-level package is enough, unless other parts of it
        have classes with the same name. A class that is already registered gets the new spec.

    docs/adding-a-model.md has an example for each kind.
    Raises TypeError for any other spec or model, and ValueError for a name without a package.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"spec must be a UNet, DiT or ViT, got {spec!r}")
    for host, name in [_names(model) for model in models]:
        _entries[host][name] = spec


def refuse(reason: str, *models: str | type[nn.Module]) -> None:
    """Let the error for these classes say why they do not merge.

    >>> refuse("its attention is in windows of the token grid", "my_package.MySwin")

    reason: completes "model must not be a MySwin: ". The rest is as in `register`.
    """
    register(_Refusal(reason), *models)


def find(module: nn.Module) -> Spec | None:
    """The spec of a module's class, or of the nearest class that it inherits from, if any."""
    spec = _nearest(module)[2]
    return None if isinstance(spec, _Refusal) else spec


def why_refused(module: nn.Module) -> str:
    """Why modules of this class do not merge; empty if no reason is known."""
    _, name, spec = _nearest(module)
    return f"model must not be a {name}: {spec.reason}" if isinstance(spec, _Refusal) else ""


def host_of(module: nn.Module) -> str:
    """The package that defines the class by which a module is known."""
    return _nearest(module)[0]


def supported() -> dict[str, tuple[str, ...]]:
    """The classes of models that apply_patch takes, by the package that defines them.

    >>> "FluxTransformer2DModel" in tomesd.supported()["diffusers"]
    True

    "*" is any package. Subclasses of these are supported too, and so are pipelines that contain
    such a model. `tomesd.register` adds a class.
    """
    found = {
        host: tuple(name for name, spec in entries.items() if not isinstance(spec, _Refusal))
        for host, entries in _entries.items()
    }
    return {host: names for host, names in found.items() if names}


def close_names(module: Any) -> list[str]:
    """The supported classes whose names are most like that of a module's class."""
    names = list(dict.fromkeys(name for each in supported().values() for name in each))
    return get_close_matches(type(module).__name__, names, n=3, cutoff=0.6)


def _nearest(module: nn.Module) -> tuple[str, str, Spec | None]:
    """Package, class and what is registered for it; None for a module of no such class."""
    for base in type(module).__mro__:
        package, name = base.__module__, base.__name__
        for host in (*_with_parents(package), "*"):
            if name in _entries.get(host, {}):
                return package.partition(".")[0], name, _entries[host][name]
    return "", "", None


def _with_parents(package: str) -> Iterator[str]:
    """a.b.c, a.b and a."""
    while package:
        yield package
        package = package.rpartition(".")[0]


def _names(model: Any) -> tuple[str, str]:
    if isinstance(model, type):
        return model.__module__.partition(".")[0], model.__name__
    if not isinstance(model, str):
        raise TypeError(f'models must be classes or "package.Class", got {model!r}')
    host, _, name = model.rpartition(".")
    if not host or not name:
        raise ValueError(f'models must be "package.Class", got {model!r}')
    return host, name
