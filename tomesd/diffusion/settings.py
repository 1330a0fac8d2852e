"""How a denoiser merges: the options, their presets, and what they may be."""

from dataclasses import dataclass, fields
from typing import Any

from tomesd.checks import require_int, require_one_of, require_type
from tomesd.diffusion.ratio_schedule import LateSchedule, Ratio, all_ratios, normal_ratio

METHODS = ("tome", "prune")
PARTITIONS = ("strided", "alternating")
# Options that only matter where a block merges branch by branch.
_BRANCHES = {"merge_attn", "merge_crossattn", "merge_mlp", "merge_queries", "keep_norm"}


@dataclass(frozen=True)
class DiffusionSettings:
    """What `apply_patch` does to a denoiser.

    >>> DiffusionSettings(ratio=0.5).merge_block
    True

    ratio: the share of a block's tokens to merge (0.5 leaves half). A float, a `RatioSchedule`
        or function of progress, or a dict of these by level; functions are sampled into schedules.
    max_downsample: merge at levels at most this much coarser than the finest one with attention: 1
        merges only at the finest, where most of the work is; 8 at all levels.
    min_tokens: merge at levels with at least this many tokens in the current image. With
        max_downsample=8 it alone selects the levels: 4,096 is the finest level of Stable Diffusion
        1.5 at 512 px and the two finest at 1024 px.
    only_where_it_pays: skip levels where merging would cost more time than it saves, estimated by
        `tomesd.core.cost` from shapes and the kind of device. "coarser": but never the finest level
        with attention, where most of the work is.
    sx, sy: one token in each cell of sy×sx is a destination and never merges away, so at most
        1 − 1/(sx·sy) of the tokens can merge.
    window: a token merges into a destination in its own window, this many tokens on a side, so that
        matching is linear in the number of tokens. 32 is global matching up to 256 px; 0 is global
        at every size.
    use_rand: draw the destination in each cell at random (a pure function of seed, timestep and
        block) instead of taking the top left token.
    seed: for all random choices. Two runs with one seed are equal bit for bit on the CPU.
    merge_block: one merge around a whole block: all of it runs on merged tokens, and what it adds
        is added to every token, x + unmerge(block(merge(x)) − merge(x)). The default, since it is
        faster than merging self-attention alone and closer to the unpatched image
        (docs/results.md).
    merge_attn, merge_crossattn, merge_mlp: with merge_block=False, the branches of a block that run
        on merged tokens, as in the papers. `apply_patch` implies merge_block=False if one of these,
        merge_queries or keep_norm is given.
    merge_queries: False merges the keys and values of self-attention only; nothing is unmerged.
    prop_attn: proportional attention, + log(size) on the logits of each key, so that a token merged
        from four counts as four (ToMe, section 3).
    keep_norm: where blocks merge branch by branch, rescale each merged token to its destination's
        norm. A branch gets its tokens from a norm layer, and averaging shrinks them: attention
        would underweight them. (Token Fusion's MLERP rescales to the largest norm of the group.)
        Whole blocks merge before their norms.
    refine: extra k-means rounds after the matching, with destinations fixed. Each costs about as
        much as the matching; worth it for high ratios (docs/results.md).
    method: "tome" merges the most similar tokens; "prune" drops random ones, the baseline of ToMe,
        Appendix F.
    partition: "strided" takes destinations from 2-D cells (ToMeSD), "alternating" every other token
        of the flattened grid (ToMe, Appendix F), which allows at most half to merge.
    across_frames: in videos, one of sx·sy neighbors in time is a destination instead of one in each
        cell of a frame, so that static content merges without loss. No effect on images.

    Raises ValueError or TypeError, naming the option, its value and what is allowed.
    """

    ratio: Ratio = 0.5
    max_downsample: int = 1
    min_tokens: int = 0
    only_where_it_pays: bool | str = False
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", normal_ratio(self.ratio))
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "only_where_it_pays" and isinstance(value, str):
                require_one_of(field.name, value, (True, False, "coarser"))
                continue
            value = require_type(field.name, value, type(field.default))
            object.__setattr__(self, field.name, value)
        for name, allowed in (("method", METHODS), ("partition", PARTITIONS)):
            require_one_of(name, getattr(self, name), allowed)
        for name in ("sx", "sy", "max_downsample"):
            require_int(name, getattr(self, name), 1)
        for name in ("window", "min_tokens", "refine"):
            require_int(name, getattr(self, name), 0)
        self._check_ratio()
        for name in ("merge_attn", "merge_queries", "keep_norm"):
            if self.merge_block and not getattr(self, name):
                raise ValueError(
                    f"{name} must be True with merge_block=True, which merges all of a block, "
                    "before its norms, got False"
                )
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError(
                "merge_attn, merge_crossattn and merge_mlp must not all be False: "
                "nothing would be merged"
            )

    def _check_ratio(self) -> None:
        for ratio in all_ratios(self.ratio):  # type: ignore[arg-type]
            if not 0 <= ratio < 1:
                raise ValueError(f"ratio must be at least 0 and below 1, got {ratio}")
            if self.method == "tome" and ratio > self.largest_ratio:
                raise ValueError(
                    f"ratio must be at most {self.largest_ratio:.4g}, got {ratio}: "
                    f"{self._why_largest()}"
                )

    @property
    def largest_ratio(self) -> float:
        """The share of the tokens that are not destinations."""
        return 0.5 if self.partition == "alternating" else 1 - 1 / (self.sx * self.sy)

    def _why_largest(self) -> str:
        if self.partition == "alternating":
            return "an alternating partition makes every other token a destination"
        return f"one token in each cell of sx·sy = {self.sx * self.sy} is a destination"


PRESETS: dict[str, dict[str, Any]] = {
    # On the frontier of quality over speed, on either side of the defaults.
    "quality": {"merge_block": False, "merge_queries": False},
    "fast": {"max_downsample": 8, "only_where_it_pays": True},
    # The default of pipelines: on the frontier at 4 and at 25 steps. A ratio becomes a
    # `LateSchedule`. Whoever asks for merging gets it, at any size.
    "late": {"max_downsample": 8, "only_where_it_pays": "coarser"},
    # The default of single models.
    "steady": {},
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


def diffusion_settings(
    ratio: Ratio, preset: str | None, options: dict[str, Any]
) -> DiffusionSettings:
    """Settings from the arguments of `apply_patch`: options override the preset.

    >>> diffusion_settings(0.5, "quality", {}).merge_queries
    False
    """
    known = [field.name for field in fields(DiffusionSettings)]
    for name in options:
        require_one_of("setting", name, known, error=TypeError)
    if preset is not None:
        require_one_of("preset", preset, tuple(PRESETS))
        if preset == "late":
            ratio = LateSchedule.of_ratio(ratio)
        options = PRESETS[preset] | options
    if "merge_block" not in options and not _BRANCHES.isdisjoint(options):
        options = options | {"merge_block": False}
    return DiffusionSettings(ratio=ratio, **options)
