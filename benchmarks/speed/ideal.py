"""The ideal that token merging is compared with: the same number of tokens, chosen at no cost."""

import math
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, cat, nn
from torch.nn import functional as F

from tomesd.diffusion.dit.families import flux, joint
from tomesd.diffusion.dit.record import Blocks
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.patch import UNetPatch
from tomesd.hooks import Patch

_FAMILIES = {
    name: family for module in (joint, flux) for family in module.FAMILIES for name in family.models
}


def install_ideal(model: Any, settings: DiffusionSettings) -> Patch:
    """Run the branches that these settings merge on the first tokens only, without matching.

    >>> handle = install_ideal(unet, DiffusionSettings(ratio=0.5))
    >>> handle.remove()

    The same blocks and branches on as many tokens as merging leaves, without proportional
    attention. In a UNet the hooks are the patch's own: a slice before, zeros for the other tokens
    after. In a transformer (SD3 or Flux, square pictures) the other tokens are appended unchanged
    after each block, one copy of [B, n, C]: the next block needs that shape. The pictures are
    useless; the time is a lower bound for any matching.
    Raises what `apply_patch` raises where nothing would be merged.
    """
    if type(model).__name__ in _FAMILIES:
        return _install_on_transformer(model, settings)
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    patch = UNetPatch(model, _SliceSettings(**values))
    patch.install()
    return patch


@dataclass(frozen=True)
class _Slice:
    """In place of a token map: the first m of n tokens.

    merge is a view. unmerge writes the m tokens followed by zeros, one pass over [B, n, C]: the
    residual that it is added to needs that shape, so no real method can write less.
    """

    n: int
    m: int

    def merge(self, x: Tensor, how: str = "mean") -> Tensor:
        return x[:, : self.m]

    def unmerge(self, y: Tensor) -> Tensor:
        return F.pad(y, (0, 0, 0, self.n - self.m))


class _SliceSettings(DiffusionSettings):
    """Settings that keep the first tokens."""

    @property
    def is_random(self) -> bool:
        return False

    @property
    def weighs_keys(self) -> bool:
        return False

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> Any:
        return _Slice(h * w, h * w - self.merged(h, w))


def _install_on_transformer(model: Any, settings: DiffusionSettings) -> Patch:
    patch = Patch()
    for kind in _FAMILIES[type(model).__name__].blocks:
        for block in getattr(model, kind.where):
            hooks = _BlockSlice(kind, settings)
            patch.before(block, hooks.cut)
            patch.after(block, hooks.join)
    return patch


@dataclass(eq=False)
class _BlockSlice:
    """The hooks of one transformer block. rest: the tokens that it does not get."""

    kind: Blocks
    settings: DiffusionSettings
    rest: Tensor | None = None

    def cut(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Keep the first tokens, a view, and the first rows of their rotary tables."""
        x = kwargs["hidden_states"]
        batch, n, channels = x.shape
        side = math.isqrt(n)
        self.rest = None
        if self.settings.why_not(x.device.type, batch, side, side, channels):
            return args, kwargs
        merged = self.settings.merged(side, side)
        self.rest = x[:, n - merged :]
        changed = kwargs | {"hidden_states": x[:, : n - merged]}
        if self.kind.rotary:
            dim = self.kind.rotary_dim
            # Cut at the end: the text's angles, if any, come first.
            changed[self.kind.rotary] = tuple(
                table.narrow(dim, 0, table.shape[dim] - merged)
                for table in changed[self.kind.rotary]
            )
        return args, changed

    def join(self, block: nn.Module, args: tuple, output: tuple) -> tuple:
        """Append the other tokens unchanged."""
        if self.rest is None:
            return output
        at, rest = self.kind.output, self.rest
        self.rest = None
        assert at is not None
        return *output[:at], cat([output[at], rest], dim=1), *output[at + 1 :]
