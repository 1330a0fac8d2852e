"""The ideal for diffusion transformers: the same blocks on as few image tokens, chosen for free."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn

from tomesd.diffusion.dit.families import flux as diffusers_transformer_flux
from tomesd.diffusion.dit.families import joint as diffusers_transformer_joint
from tomesd.diffusion.dit.record import Blocks
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.hooks import Patch

_FAMILIES = {
    name: family
    for module in (diffusers_transformer_joint, diffusers_transformer_flux)
    for family in module.FAMILIES
    for name in family.models
}


@dataclass(eq=False)
class _Slice:
    """The hooks of one block. rest: the tokens that it does not see while it runs."""

    kind: Blocks
    settings: DiffusionSettings
    rest: Tensor | None = None

    def cut(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The first tokens, a view, and the first rows of their rotary tables."""
        x = kwargs["hidden_states"]
        batch, n, channels = x.shape
        side = math.isqrt(n)
        self.rest = None
        if self.settings.why_not(x.device.type, batch, side, side, channels):
            return args, kwargs
        merged = self.settings.merged(side, side)
        self.rest = x[:, n - merged :]
        given = kwargs | {"hidden_states": x[:, : n - merged]}
        if self.kind.rotary:
            dim = self.kind.rotary_dim
            # The text's angles come first where there are any: cut at the end.
            given[self.kind.rotary] = tuple(
                table.narrow(dim, 0, table.shape[dim] - merged) for table in given[self.kind.rotary]
            )
        return args, given

    def join(self, block: nn.Module, args: tuple, output: tuple) -> tuple:
        """Put the other tokens behind again, as they were."""
        if self.rest is None:
            return output
        at, rest = self.kind.output, self.rest
        self.rest = None
        assert at is not None
        return *output[:at], cat([output[at], rest], dim=1), *output[at + 1 :]


def install_ideal(model: Any, settings: DiffusionSettings) -> Patch:
    """Let each block of SD3 or Flux run on its first image tokens only, without matching.

    >>> handle = install_ideal(transformer, DiffusionSettings(ratio=0.5))
    >>> handle.remove()

    As many of them as merging would leave, of a square picture; all text tokens; no proportional
    attention. The others are put behind the block's output as they were, one copy of [B, n, C]: the
    next block needs that shape, so no real method can write less. What the picture looks like is of
    no interest; the time is a bound that no matching can beat.
    """
    patch = Patch()
    for kind in _FAMILIES[type(model).__name__].blocks:
        for block in getattr(model, kind.where):
            hooks = _Slice(kind, settings)
            patch.before(block, hooks.cut)
            patch.after(block, hooks.join)
    return patch
