"""From `DiffusionSettings` to token maps: which tokens of a denoiser's block merge, and whether."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from tomesd import kernels
from tomesd.core import partition
from tomesd.core.cost import Balance, balance
from tomesd.core.matching import bipartite_soft_matching, random_pruning
from tomesd.core.partition import Partition, Windows
from tomesd.core.rows import fixed, is_exporting
from tomesd.core.token_map import TokenMap
from tomesd.core.workload import Branches
from tomesd.diffusion.settings import DiffusionSettings


class Matcher:
    """Makes the token maps of a denoiser's blocks. A benchmark can pass another one to the patch.

    >>> matcher = Matcher(DiffusionSettings())
    >>> matcher.token_map(torch.randn(2, 64, 8), h=8, w=8, ratio=0.5, key=None).m
    32
    """

    def __init__(self, settings: DiffusionSettings):
        self.settings = settings
        self._branches = Branches(
            merge_attn=settings.merge_attn,
            merge_crossattn=settings.merge_crossattn,
            merge_mlp=settings.merge_mlp,
            merge_queries=settings.merge_queries,
            merge_block=settings.merge_block,
        )

    @property
    def is_random(self) -> bool:
        settings = self.settings
        return settings.method == "prune" or (settings.use_rand and settings.partition == "strided")

    @property
    def weighs_keys(self) -> bool:
        """Whether attention needs log(size) on its keys; pruning leaves all sizes at 1."""
        return self.settings.prop_attn and self.settings.method == "tome"

    @property
    def combine(self) -> str:
        """How a group becomes one token: `how` of `TokenMap.merge`."""
        settings = self.settings
        return "direction" if settings.keep_norm and not settings.merge_block else "mean"

    def merged(self, ratio: float, h: int, w: int) -> int:
        """How many of h·w tokens merge: what the ratio says, as far as the partition allows."""
        return min(self._sources(h, w), max(1, int(ratio * h * w)))

    def _sources(self, h: int, w: int) -> int:
        settings = self.settings
        if settings.method == "prune":
            return h * w - 1
        if settings.partition == "alternating":
            return (h * w + 1) // 2 if h * w > 1 else 0
        return h * w - -(-h // settings.sy) * -(-w // settings.sx)

    def why_not(
        self,
        ratio: float,
        device: torch.device,
        batch: int,
        h: int,
        w: int,
        channels: int,
        *,
        joint: bool = False,
        finest: bool = True,
    ) -> str:
        """Why blocks with h·w tokens do not merge; empty if they do. From shapes alone.

        joint: whether they attend to text and image together, as those of SD3 and Flux do. finest:
        whether no other blocks with attention have more tokens.
        """
        settings = self.settings
        if ratio == 0:
            return "ratio is 0"
        if h * w < settings.min_tokens:
            return f"fewer than min_tokens={settings.min_tokens}"
        where = settings.only_where_it_pays
        if not where or (where == "coarser" and finest):
            return ""
        if is_exporting():  # Batches may be of any size; the smallest one gains least.
            batch = 1
        # Cached: computing it takes as long as several kernels. A graph needs no cache, and dynamo
        # cannot trace one.
        estimate = balance if torch.compiler.is_compiling() else _cached_balance
        # Not `.pays`: torch 2.9 cannot compile the property of a named tuple.
        saved, spent = self.balance(
            ratio,
            kernels.device_kind(device),
            batch,
            h,
            w,
            channels,
            joint=joint,
            fused=kernels.available(device),
            # In a graph nothing waits for Python.
            eager=not torch.compiler.is_compiling(),
            estimate=estimate,
        )
        return "" if saved > spent else "would cost more time than it saves"

    def balance(
        self,
        ratio: float,
        device_kind: str,
        batch: int,
        h: int,
        w: int,
        channels: int,
        *,
        joint: bool,
        fused: bool,
        eager: bool = True,
        estimate: Callable[..., Balance] = balance,
    ) -> Balance:
        """What merging saves and costs in one block with h·w tokens, by the cost model."""
        settings = self.settings
        return estimate(
            device_kind,
            batch,
            h * w,
            self.merged(ratio, h, w),
            channels,
            branches=self._branches,
            destinations=h * w - self._sources(h, w),
            window=settings.window or None,
            refine=settings.refine,
            keep_norm=settings.keep_norm,
            joint=joint,
            fused=fused,
            eager=eager,
        )

    def token_map(
        self, features: Tensor, h: int, w: int, ratio: float, key: Tensor | None
    ) -> TokenMap:
        """The token map of one block: features [B, h·w, C]; a key if `is_random`."""
        batch, n = features.shape[0], fixed(features.shape[1])
        r = self.merged(ratio, h, w)
        if self.settings.method == "prune":
            dropped = partition.random(n, n_src=r, key=key, device=features.device)
            return random_pruning(batch, n, dropped)
        sides = self._partition(features, h, w, key)
        return bipartite_soft_matching(features, sides, r, refine=self.settings.refine)

    def _partition(
        self, features: Tensor, h: int, w: int, key: Tensor | None
    ) -> Partition | Windows:
        settings, device = self.settings, features.device
        if settings.partition == "alternating":
            return partition.alternating(h * w, device=device)
        cells = (h, w, settings.sy, settings.sx)
        if not settings.window:
            return partition.strided(*cells, key=key, device=device)
        # Not cached in a graph, nor for tensor subclasses such as fake tensors.
        if key is None and type(features) is Tensor and not torch.compiler.is_compiling():
            return _cached_windows(*cells, settings.window, device)
        return partition.windowed(*cells, settings.window, key=key, device=device)


_cached_balance = lru_cache(maxsize=1024)(balance)


@lru_cache(maxsize=64)
def _cached_windows(h: int, w: int, sy: int, sx: int, window: int, device: torch.device) -> Windows:
    """Windows without a key depend on shapes only, and making them takes more small operators than
    the rest of a match: on a GPU, most of its time."""
    with torch.inference_mode(False):  # They may be used in training later.
        return partition.windowed(h, w, sy, sx, window, device=device)
