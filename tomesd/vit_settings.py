"""How a Vision Transformer merges: the settings, and the token map that they give each layer."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tomesd import partition, schedule
from tomesd.matching import bipartite_soft_matching
from tomesd.partition import Partition
from tomesd.schedule import Schedule
from tomesd.settings import _require_one_of
from tomesd.token_map import TokenMap

FEATURES = ("x_pre", "x", "k", "q", "v")
HEADS = ("mean", "concatenate")
COMBINES = ("weighted", "mean", "max", "head")
PARTITIONS = ("alternating", "sequential", "random")


@dataclass(frozen=True)
class ViTSettings:
    """What `apply_patch` does to a Vision Transformer. Every default is the paper's (its Table 1).

    >>> ViTSettings(r=(8, -1)).features
    'k'

    r: how many tokens merge in each layer: an int, (r, inflection) where −1 is the paper's
        decreasing schedule, or a list with one int per layer; see `tomesd.schedule`. At most half
        of a layer's tokens merge, whatever r says.
    speedup: instead of r, the smallest constant r that saves this factor of multiply-adds.
    prop_attn: proportional attention, + log(size) on the keys' logits. Switch it off for models
        pretrained as masked autoencoders and used off the shelf, where it costs accuracy.
    unmerge: give every token its group's value after the last layer, for heads and decoders that
        want all tokens. False hands on the merged ones: a mean over them no longer counts a group
        as often as it has members.
    features: what tells tokens apart: "k", "q", "v" (keys, queries, values), "x_pre" (the block's
        input) or "x" (after attention).
    heads: how the heads of q, k, v count: "mean" compares their average, "concatenate" all.
    combine: how a group becomes one token: "weighted" by sizes, plain "mean", "max", or "head",
        which keeps one of them.
    partition: which tokens may merge into which: "alternating", "sequential" or "random" halves.
    seed: of all that is random.

    Raises ValueError or TypeError, naming the setting, its value and what is allowed.
    Source: ToMe, section 3 and Table 1.
    """

    r: Schedule = 0
    speedup: float | None = None
    prop_attn: bool = True
    unmerge: bool = True
    features: str = "k"
    heads: str = "mean"
    combine: str = "weighted"
    partition: str = "alternating"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prop_attn", "unmerge", "seed"):
            value, kind = getattr(self, name), bool if name != "seed" else int
            if type(value) is not kind:
                raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
        if self.speedup is not None and type(self.speedup) not in (int, float):
            raise TypeError(f"speedup must be a number or None, got {self.speedup!r}")
        layers = len(self.r) if isinstance(self.r, list) else 1
        schedule.per_layer(self.r, layers)
        if self.speedup is not None and self.r != 0:
            raise ValueError(f"r must not be given beside speedup, got r={self.r!r}")
        for name, allowed in _CHOICES.items():
            _require_one_of(name, getattr(self, name), allowed)

    @property
    def needs(self) -> tuple[str, ...]:
        """The features that `token_map` looks at."""
        return (self.features,)

    def token_map(self, features: dict[str, Tensor], prefix: int, r: int, layer: int) -> TokenMap:
        """Which r tokens of a layer merge.

        features: what `needs` names, [B, N, H, D] each (H is 1 where there are no heads).
        """
        metric = features[self.features]
        metric = metric.mean(2) if self.heads == "mean" else metric.flatten(2)
        n, device = metric.shape[1], metric.device
        return bipartite_soft_matching(metric, self._sides(n, prefix, layer, device), r)

    def _sides(self, n: int, prefix: int, layer: int, device: torch.device) -> Partition:
        if self.partition == "random":
            key = partition.make_key(self.seed, block=layer)
            return partition.random(n, key=key, prefix=prefix, device=device)
        halves = partition.alternating if self.partition == "alternating" else partition.sequential
        return halves(n, prefix=prefix, device=device)


_CHOICES = {
    "features": FEATURES,
    "heads": HEADS,
    "combine": COMBINES,
    "partition": PARTITIONS,
}


def vit_settings(settings: dict) -> ViTSettings:
    """Settings from `apply_patch`'s arguments."""
    known = [field.name for field in fields(ViTSettings)]
    for name in settings:
        _require_one_of("setting", name, known, error=TypeError)
    if "r" not in settings and "speedup" not in settings:
        raise TypeError(
            "r (tokens to merge in each layer, for example r=8) or speedup must be given"
        )
    return ViTSettings(**settings)
