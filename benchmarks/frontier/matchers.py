"""Keys and values from a plain grid (ToDo): a matcher that is only measured."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tomesd.diffusion.matcher import Matcher


@dataclass(frozen=True)
class _Cells:
    """In place of a token map: one token for each cell of sy×sx, for keys and values alone."""

    h: int
    w: int
    sy: int
    sx: int
    pools: bool

    def merge(self, x: Tensor, how: str = "mean") -> Tensor:
        if not self.pools:
            return x.unflatten(1, (self.h, self.w))[:, :: self.sy, :: self.sx].flatten(1, 2)
        picture = x.transpose(1, 2).unflatten(2, (self.h, self.w))
        # The last cells are smaller where the stride does not divide the grid.
        means = F.avg_pool2d(picture, (self.sy, self.sx), ceil_mode=True, count_include_pad=False)
        return means.flatten(2).transpose(1, 2)


class GridMatcher(Matcher):
    """Keys and values from a grid: the top left token of each cell of sy×sx, as in
    nearest-neighbour downsampling.

    >>> settings = DiffusionSettings(ratio=0.75, merge_block=False, merge_queries=False)
    >>> GridMatcher(settings).merged(0.75, 32, 32)
    768

    Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution
    Images" (2024).
    """

    pools = False
    weighs_keys = False  # All cells have the same size.
    combine = "mean"

    def merged(self, ratio: float, h: int, w: int) -> int:
        settings = self.settings
        return h * w - -(-h // settings.sy) * -(-w // settings.sx)

    def token_map(self, features: Tensor, h: int, w: int, ratio: float, key: Tensor | None) -> Any:
        return _Cells(h, w, self.settings.sy, self.settings.sx, self.pools)


class PoolingGridMatcher(GridMatcher):
    """The mean of each cell's tokens instead."""

    pools = True
