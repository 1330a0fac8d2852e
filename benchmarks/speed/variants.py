"""The variants of a denoiser that are compared: unpatched, patched, the ideal, and the peer."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FunctionType
from typing import Any

import torch

from benchmarks.speed.ideal import install_ideal
from tomesd.api import apply_patch
from tomesd.diffusion.settings import DiffusionSettings

KINDS = ("unpatched", "patched", "ideal", "peer")


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    >>> Variant("tome 0.5", "patched", DiffusionSettings(ratio=0.5)).kind
    'patched'

    kind: one of KINDS. settings: None for the unpatched model.
    """

    name: str
    kind: str
    settings: DiffusionSettings | None = None


def prepare(model: Any, variant: Variant) -> Any:
    """Patch a UNet or transformer in place as the variant requires; returns it.

    >>> model = prepare(model, Variant("ideal 0.5", "ideal", DiffusionSettings(ratio=0.5)))

    Raises what `apply_patch` raises.
    """
    if variant.kind in ("patched", "ideal"):
        assert variant.settings is not None
        if variant.kind == "patched":
            apply_patch(model, **asdict(variant.settings))
        else:
            install_ideal(model, variant.settings)
    return model


def forward(model: Any, inputs: tuple[tuple, dict], compiled: str | None) -> Callable[[], Any]:
    """A function that runs the model once on these inputs, without gradients.

    >>> sample, = forward(unet, unet_inputs(SD15, 2, 64, device, dtype), compiled=None)()

    compiled: torch.compile's mode; None runs eagerly.
    """
    args, kwargs = inputs

    def call() -> Any:
        return model(*args, **kwargs)

    if compiled:
        # Dynamo caches by code object and does not notice that hooks differ: with one code object
        # for all, every variant would run the first one's graph.
        own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
        call = torch.compile(own, fullgraph=True, dynamic=False, mode=compiled)

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run
