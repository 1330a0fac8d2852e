"""How a Vision Transformer merges: the options."""

from dataclasses import dataclass, fields
from typing import Any

from tomesd.checks import require_one_of, require_type
from tomesd.vit import schedule
from tomesd.vit.matcher import DEFAULT_ORDER, ORDERS
from tomesd.vit.schedule import Schedule

# Choices that the paper compares; they are measured in benchmarks/classifier.
_ABLATIONS = (
    *("features", "heads", "combine", "distance", "partition", "method", "kmeans_iterations"),
    "seed",
)


@dataclass(frozen=True)
class ViTSettings:
    """What `apply_patch` does to a Vision Transformer. Every default is the paper's (its Table 1).

    >>> ViTSettings(r=(8, -1)).r
    (8, -1.0)

    r: how many tokens merge in each layer: an int, (r, inflection) where −1 is the paper's
        decreasing schedule, or a list with one int per layer; see `tomesd.vit.schedule`. At most
        half of a layer's tokens merge, whatever r says. A layer with r = 0 does not merge; 0 for
        all layers changes nothing, like ratio=0 for a denoiser.
    speedup: instead of r: takes the smallest constant r that divides the multiply-adds by this.
    prop_attn: proportional attention, + log(size) on the logits of each key. Turn it off for models
        pretrained as masked autoencoders and used without fine-tuning, where it costs accuracy.
    unmerge: copy each group's value back to its tokens after the last layer, for heads and decoders
        that need all tokens. False returns the merged ones: a mean over them no longer weights
        groups by size. Outputs of earlier layers that a caller may keep are unmerged too: hidden
        states, intermediates, feature maps, what hooks on blocks see.
    within_blocks: merge within each block alone, as in denoisers: x + unmerge(block(merge(x)) −
        merge(x)). Every block gets all tokens, so nothing is lost for good and dense outputs stay
        sharp; r may then be up to half of the tokens. Tokens are matched by the block's input. The
        only way where the next block needs the token grid (SAM, ViTDet).
    order: the order in which a layer passes its tokens to the next, which takes every other one as
        a destination. "positions" (default) keeps their order; "concatenated" is that of the
        paper's code: unmerged sources, then destinations. On the embedded classifier the latter is
        more accurate only where nearly all tokens merge.

    Tokens are matched by the cosine similarity of their keys, averaged over heads, in alternating
    halves; a merged token is the mean, weighted by size. Re-entrant gradient checkpointing needs
    the backward pass of each forward before the next forward.

    Raises ValueError or TypeError, naming the option, its value and what is allowed.
    Source: ToMe, section 3 and Table 1.
    """

    r: Schedule = 0
    speedup: float | None = None
    prop_attn: bool = True
    unmerge: bool = True
    order: str = DEFAULT_ORDER
    within_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("prop_attn", "unmerge", "within_blocks"):
            require_type(name, getattr(self, name), bool)
        require_one_of("order", self.order, ORDERS)
        if self.speedup is not None:
            object.__setattr__(self, "speedup", require_type("speedup", self.speedup, float))
        object.__setattr__(self, "r", schedule.checked(self.r))
        if self.speedup is not None and self.r != 0:
            raise ValueError(f"r must not be given with speedup, got r={self.r!r}")
        if self.within_blocks and not self.unmerge:
            raise ValueError(
                "unmerge must be True with within_blocks=True, which unmerges after each block, "
                "got False"
            )


def vit_settings(options: dict[str, Any]) -> ViTSettings:
    """Settings from the arguments of `apply_patch`.

    >>> vit_settings({"r": 8}).r
    8
    """
    known = [field.name for field in fields(ViTSettings)]
    for name in options:
        if name in _ABLATIONS:
            raise TypeError(
                f"setting must be one of {', '.join(known)}, got {name!r}: the paper's ablations "
                "are matchers in benchmarks/classifier"
            )
        require_one_of("setting", name, known, error=TypeError)
    if "r" not in options and "speedup" not in options:
        raise TypeError(
            "r (tokens to merge in each layer, for example r=8) or speedup must be given"
        )
    return ViTSettings(**options)
