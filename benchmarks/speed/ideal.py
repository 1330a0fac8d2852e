"""The ideal that token merging is compared with: the same number of tokens, chosen at no cost."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn
from torch.nn import functional as F

from tomesd import registry
from tomesd.diffusion.dit import DiT
from tomesd.diffusion.dit.spec import Blocks
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet import UNet, UNetPatch
from tomesd.hooks import Patch


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
    spec = registry.find(model)
    if isinstance(spec, DiT):
        return _install_on_transformer(spec, model, settings)
    assert isinstance(spec, UNet)
    patch = UNetPatch(spec, model, settings, matcher=SliceMatcher(settings))
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


class SliceMatcher(Matcher):
    """Keeps the first tokens.

    >>> SliceMatcher(DiffusionSettings(ratio=0.5)).token_map(x, 64, 64, 0.5, None).m
    2048
    """

    is_random = False
    weighs_keys = False

    def token_map(self, features: Tensor, h: int, w: int, ratio: float, key: Tensor | None) -> Any:
        return _Slice(h * w, h * w - self.merged(ratio, h, w))


def _install_on_transformer(spec: DiT, model: Any, settings: DiffusionSettings) -> Patch:
    patch = Patch()
    matcher = SliceMatcher(settings)
    for blocks in spec.lists:
        for block in getattr(model, blocks.name):
            hooks = _BlockSlice(blocks, matcher)
            patch.before(block, hooks.cut)
            patch.after(block, hooks.join)
    return patch


@dataclass(eq=False)
class _BlockSlice:
    """The hooks of one transformer block. rest: the tokens that it does not get."""

    blocks: Blocks
    matcher: Matcher
    rest: Tensor | None = None

    def cut(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Keep the first tokens, a view, and the first rows of their rotary tables."""
        x = kwargs["hidden_states"]
        batch, n, channels = x.shape
        side, ratio = math.isqrt(n), self.matcher.settings.ratio
        assert isinstance(ratio, float)
        self.rest = None
        if self.matcher.why_not(ratio, x.device, batch, side, side, channels, joint=True):
            return args, kwargs
        merged = self.matcher.merged(ratio, side, side)
        self.rest = x[:, n - merged :]
        changed = kwargs | {"hidden_states": x[:, : n - merged]}
        if self.blocks.rotary:
            name, dim = self.blocks.rotary.argument, self.blocks.rotary.dim
            # Cut at the end: the text's angles, if any, come first.
            changed[name] = tuple(
                table.narrow(dim, 0, table.shape[dim] - merged) for table in changed[name]
            )
        return args, changed

    def join(self, block: nn.Module, args: tuple, output: tuple) -> tuple:
        """Append the other tokens unchanged."""
        if self.rest is None:
            return output
        at, rest = self.blocks.output, self.rest
        self.rest = None
        assert at is not None
        return *output[:at], cat([output[at], rest], dim=1), *output[at + 1 :]
