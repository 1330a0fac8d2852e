"""How a diffusion model merges: the settings, their presets, and the token map that they give."""

from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from tomesd.core import partition
from tomesd.core.cost import balance
from tomesd.core.matching import bipartite_soft_matching, random_pruning
from tomesd.core.partition import Partition, Windows
from tomesd.core.token_map import TokenMap
from tomesd.core.workload import Branches

METHODS = ("tome", "prune")
# Settings that mean something only where a block merges branch by branch.
_BRANCHES = {"merge_attn", "merge_crossattn", "merge_mlp", "merge_queries", "keep_norm"}
PARTITIONS = ("strided", "alternating")


@dataclass(frozen=True)
class DiffusionSettings:
    """What `apply_patch` does to a denoiser.

    >>> DiffusionSettings(ratio=0.5).merge_block
    True

    ratio: share of a block's tokens that merge into others (0.5: half as many are left).
    max_downsample: merge at levels at most this much coarser than the finest one with attention.
        1 merges at the finest only, where most of the work is; 8 everywhere.
    min_tokens: merge at levels with at least so many tokens in the picture at hand. With
        max_downsample=8 it alone says which: 4,096 is the finest level of Stable Diffusion 1.5 at
        512 px and the two finest ones at 1024 px.
    only_where_it_pays: leave alone the levels where merging cannot save more time than it takes, as
        `tomesd.core.cost` estimates from their shapes and the kind of device.
    sx, sy: one token in each cell of sy×sx is a destination and never merges away itself, so at
        most 1 − 1/(sx·sy) of the tokens can merge.
    window: a token merges into a destination of its own window of so many tokens along a side, so
        that matching grows with the number of tokens instead of its square. 32 is global matching
        up to 256 px; 0 is global everywhere.
    use_rand: draw the destination in each cell at random (a pure function of seed, timestep and
        block) instead of taking the top left one.
    seed: of all that is random. Two runs with the same seed are equal bit for bit on the CPU.
    merge_block: one merge around a whole block: all of it runs on the merged tokens, and what it
        adds to them is given back to every token, x + unmerge(block(merge(x)) − merge(x)). The
        default, since it is faster than merging self-attention alone and closer to the unpatched
        picture (docs/performance.md).
    merge_attn, merge_crossattn, merge_mlp: branch by branch instead, as in the papers, with
        merge_block=False: which branches of a block run on merged tokens. `apply_patch` takes
        merge_block for False where one of these, or merge_queries, is given.
    merge_queries: False merges the keys and values of self-attention only; nothing is unmerged.
    prop_attn: proportional attention, + log(size) on the keys' logits, so that a token merged from
        four counts as four (ToMe, section 3).
    keep_norm: where blocks merge branch by branch, a merged token is as long as its head. A branch
        gets its tokens from a norm layer, and a mean of them is shorter, the more so the less alike
        they are: attention would see it too faintly. Token Fusion's MLERP is for the same, with the
        longest token's norm. Whole blocks merge before their norms.
    refine: how often each token looks again for the group that is most like it, once groups are
        known: spherical k-means, where destinations stay where they are. Each time costs about
        what the matching itself does; worth it where much merges (docs/performance.md).
    method: "tome" merges the most similar tokens; "prune" drops random ones, the baseline of ToMe,
        Appendix F.
    partition: "strided" takes destinations from 2-D cells (ToMeSD), "alternating" every other
        token of the flattened grid (ToMe, Appendix F), which allows at most half to merge.
    across_frames: in the tokens of a video, one of sx·sy neighbours in time is a destination
        instead of one in each cell of a frame, so that what stands still merges without loss.
        Pictures have no such neighbours; they merge as they would without.

    Raises ValueError or TypeError, naming the setting, its value and what is allowed.
    """

    ratio: float = 0.5
    max_downsample: int = 1
    min_tokens: int = 0
    only_where_it_pays: bool = False
    sx: int = 2
    sy: int = 2
    window: int = 32
    use_rand: bool = False
    seed: int = 0
    merge_block: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    merge_queries: bool = True
    prop_attn: bool = True
    keep_norm: bool = True
    refine: int = 0
    method: str = "tome"
    partition: str = "strided"
    across_frames: bool = False
    _fixed_ratio: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind: Any = type(field.default)
            if not _fits(value, kind):
                raise TypeError(f"{field.name} must be {kind.__name__}, got {value!r}")
            # NumPy's numbers become Python's: a compiler would trace them as tensors.
            object.__setattr__(self, field.name, kind(value))
        for name, allowed in (("method", METHODS), ("partition", PARTITIONS)):
            require_one_of(name, getattr(self, name), allowed)
        for name in ("sx", "sy", "max_downsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("window", "min_tokens", "refine"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be at least 0 and below 1, got {self.ratio}")
        if self.method == "tome" and self.ratio > self.largest_ratio:
            raise ValueError(
                f"ratio must be at most {self.largest_ratio:.4g}, got {self.ratio}: "
                f"{self._why_largest()}"
            )
        for name in ("merge_attn", "merge_queries", "keep_norm"):
            if self.merge_block and not getattr(self, name):
                raise ValueError(
                    f"{name} must be True with merge_block=True, which merges all of a block, and "
                    "before its norms, got False"
                )
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError(
                "merge_attn, merge_crossattn and merge_mlp must not all be False: "
                "nothing would be merged"
            )
        # torch.compile(dynamic=True) takes any float that it meets for a variable, but a text for
        # what it is; how many tokens merge must not be a variable.
        object.__setattr__(self, "_fixed_ratio", repr(self.ratio))

    @property
    def largest_ratio(self) -> float:
        """How much can merge at all: everything that is not a destination."""
        return 0.5 if self.partition == "alternating" else 1 - 1 / (self.sx * self.sy)

    def _why_largest(self) -> str:
        if self.partition == "alternating":
            return "an alternating partition makes every other token a destination"
        return f"one token in each cell of sx·sy = {self.sx * self.sy} is a destination"

    @property
    def is_random(self) -> bool:
        return self.method == "prune" or (self.use_rand and self.partition == "strided")

    @property
    def weighs_keys(self) -> bool:
        """Whether attention needs log(size) on its keys; dropped tokens leave all sizes at 1."""
        return self.prop_attn and self.method == "tome"

    @property
    def combine(self) -> str:
        """How a group becomes one token, as `TokenMap.merge` calls it."""
        return "direction" if self.keep_norm and not self.merge_block else "mean"

    def merged(self, h: int, w: int) -> int:
        """How many of the h·w tokens merge: what the ratio says, as far as the partition allows."""
        return min(self._allowed(h, w), max(1, int(float(self._fixed_ratio) * h * w)))

    def _allowed(self, h: int, w: int) -> int:
        if self.method == "prune":
            return h * w - 1
        if self.partition == "alternating":
            return (h * w + 1) // 2 if h * w > 1 else 0
        return h * w - -(-h // self.sy) * -(-w // self.sx)

    def why_not(
        self, device_kind: str, batch: int, h: int, w: int, channels: int, *, joint: bool = False
    ) -> str:
        """Why blocks on h·w tokens are left alone, or nothing if they merge. From shapes alone.

        joint: whether they are of SD3's or Flux's kind, which attend to the text with the picture.
        """
        tokens = h * w
        if float(self._fixed_ratio) == 0:
            return "ratio is 0"
        if tokens < self.min_tokens:
            return f"fewer than min_tokens={self.min_tokens}"
        # Kept from call to call: to count it out takes as long as several kernels. A graph keeps it
        # by itself, and what compiles it cannot look into a cache.
        pays = _pays if torch.compiler.is_compiling() else _kept_pays
        if not self.only_where_it_pays or pays(self, device_kind, batch, h, w, channels, joint):
            return ""
        return "would cost more time than it saves"

    def token_map(self, features: Tensor, h: int, w: int, key: Tensor | None) -> TokenMap:
        """The token map of one block: features [B, h·w, C]; a key where `is_random`."""
        batch, n, _ = features.shape
        r = self.merged(h, w)
        device = features.device
        if self.method == "prune":
            return random_pruning(batch, n, partition.random(n, n_src=r, key=key, device=device))
        sides: Partition | Windows
        if self.partition == "alternating":
            sides = partition.alternating(n, device=device)
        elif self.window:
            where = (h, w, self.sy, self.sx, self.window)
            # Kept where that is safe: not in a graph, nor for tensors that only pretend to be some.
            if key is None and type(features) is Tensor and not torch.compiler.is_compiling():
                sides = _kept_windows(*where, device)
            else:
                sides = partition.windowed(*where, key=key, device=device)
        else:
            sides = partition.strided(h, w, self.sy, self.sx, key=key, device=device)
        return bipartite_soft_matching(features, sides, r, refine=self.refine)


def _pays(
    settings: DiffusionSettings,
    device_kind: str,
    batch: int,
    h: int,
    w: int,
    channels: int,
    joint: bool,
) -> bool:
    r = settings.merged(h, w)
    return balance(
        device_kind,
        batch,
        h * w,
        r,
        channels,
        branches=Branches(
            merge_attn=settings.merge_attn,
            merge_crossattn=settings.merge_crossattn,
            merge_mlp=settings.merge_mlp,
            merge_queries=settings.merge_queries,
            merge_block=settings.merge_block,
        ),
        destinations=h * w - settings._allowed(h, w),
        window=settings.window or None,
        refine=settings.refine,
        keep_norm=settings.keep_norm,
        joint=joint,
    ).pays


_kept_pays = lru_cache(maxsize=1024)(_pays)


@lru_cache(maxsize=64)
def _kept_windows(h: int, w: int, sy: int, sx: int, window: int, device: torch.device) -> Windows:
    """Windows without a key depend on the shape alone, and making them is most of all the small
    operators of a match: on a GPU, most of its time."""
    with torch.inference_mode(False):  # They may serve in training later.
        return partition.windowed(h, w, sy, sx, window, device=device)


PRESETS: dict[str, dict] = {
    # What the frontier of quality over speed offers on either side of the defaults.
    "quality": {"merge_block": False, "merge_queries": False},
    "fast": {"max_downsample": 8, "only_where_it_pays": True},
    # ToMe, Appendix F: every branch of every block, one matching for all three, plain means, no
    # proportional attention.
    "paper": {
        "max_downsample": 8,
        "merge_block": False,
        "merge_crossattn": True,
        "merge_mlp": True,
        "prop_attn": False,
        "keep_norm": False,
        "partition": "alternating",
    },
}


def diffusion_settings(ratio: float, preset: str | None, settings: dict) -> DiffusionSettings:
    """Settings from `apply_patch`'s arguments: what is given wins over what the preset says."""
    known = [field.name for field in fields(DiffusionSettings)]
    for name in settings:
        require_one_of("setting", name, known, error=TypeError)
    if preset is not None:
        require_one_of("preset", preset, tuple(PRESETS))
        settings = PRESETS[preset] | settings
    if "merge_block" not in settings and not _BRANCHES.isdisjoint(settings):
        settings = settings | {"merge_block": False}
    return DiffusionSettings(ratio=ratio, **settings)


def _fits(value: Any, kind: type) -> bool:
    """Whether it is of that kind, a NumPy number too; but a bool is no number."""
    if kind is float or kind is int:
        number = Real if kind is float else Integral
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def require_one_of(name: str, value, allowed, error: type[Exception] = ValueError) -> None:
    if value not in allowed:
        raise error(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
