"""The ideal that token merging can be measured against: as few tokens, but chosen for free."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.patch import UNetPatch


@dataclass(frozen=True)
class _Slice:
    """In a token map's place: the first m of n tokens.

    merge is a view, however it is asked to combine. unmerge writes the m tokens and zeros behind
    them, one pass over [B, n, C]: the residual that it is added to needs that shape, so no real
    method can write less.
    """

    n: int
    m: int

    def merge(self, x: Tensor, how: str = "mean") -> Tensor:
        return x[:, : self.m]

    def unmerge(self, y: Tensor) -> Tensor:
        return F.pad(y, (0, 0, 0, self.n - self.m))


class _SliceSettings(DiffusionSettings):
    """Settings under which the same blocks run on the same number of tokens, the first ones."""

    @property
    def is_random(self) -> bool:
        return False

    @property
    def weighs_keys(self) -> bool:
        return False

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> Any:
        return _Slice(h * w, h * w - self.merged(h, w))


def install_ideal(unet: Any, settings: DiffusionSettings) -> UNetPatch:
    """Let the branches that these settings merge run on the first tokens only, without matching.

    >>> handle = install_ideal(unet, DiffusionSettings(ratio=0.5))
    >>> handle.remove()

    The same blocks and branches, by the same hooks, on as many tokens as merging would leave: a
    plain slice on the way in, zeros for the others on the way out, no proportional attention. What
    the picture looks like is of no interest; the time is a bound that no matching can beat.
    Raises what `apply_patch` raises where nothing would be merged.
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    patch = UNetPatch(unet, _SliceSettings(**values))
    patch.install()
    return patch
