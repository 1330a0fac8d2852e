"""What a benchmark compares: a denoiser unpatched, patched, and with the ideal in its place."""

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
    """One line of the table.

    >>> Variant("tome 0.5", "patched", DiffusionSettings(ratio=0.5))

    kind: one of KINDS. settings: None for the unpatched model alone.
    """

    name: str
    kind: str
    settings: DiffusionSettings | None = None


def prepare(unet: Any, variant: Variant) -> Any:
    """The UNet as the variant has it, changed in place.

    >>> unet = prepare(unet, Variant("ideal 0.5", "ideal", DiffusionSettings(ratio=0.5)))

    Raises what `apply_patch` raises.
    """
    if variant.kind == "patched":
        assert variant.settings is not None
        apply_patch(unet, **asdict(variant.settings))
    elif variant.kind == "ideal":
        assert variant.settings is not None
        install_ideal(unet, variant.settings)
    return unet


def forward(unet: Any, inputs: tuple[tuple, dict], compiled: str | None) -> Callable[[], Any]:
    """A function that runs the UNet once on these inputs, without gradients.

    >>> sample, = forward(unet, unet_inputs(SD15, 2, 64, device, dtype), compiled=None)()

    compiled: torch.compile's mode; None runs eagerly.
    """
    args, kwargs = inputs

    def call() -> Any:
        return unet(*args, **kwargs)

    if compiled:
        # Dynamo keeps compiled code by code object and does not notice that hooks differ: with one
        # code object for all, every variant would run the first one's graph.
        own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
        call = torch.compile(own, fullgraph=True, dynamic=False, mode=compiled)

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run
