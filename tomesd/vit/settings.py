"""How a Vision Transformer merges: the settings, and the token map that they give each layer."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks.classifier import rivals
from tomesd.core import partition
from tomesd.core.matching import DISTANCES, bipartite_soft_matching, random_pruning
from tomesd.core.partition import Partition
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.settings import _fits, require_one_of
from tomesd.vit import schedule
from tomesd.vit.schedule import Schedule

FEATURES = ("x_pre", "x", "k", "q", "v")
HEADS = ("mean", "concatenate")
COMBINES = ("weighted", "mean", "max", "head")
PARTITIONS = ("alternating", "sequential", "random")
METHODS = ("bipartite", "greedy", "kmeans", "energy", "prune_random", "prune_attention")


@dataclass(frozen=True)
class ViTSettings:
    """What `apply_patch` does to a Vision Transformer. Every default is the paper's (its Table 1).

    >>> ViTSettings(r=(8, -1)).features
    'k'

    r: how many tokens merge in each layer: an int, (r, inflection) where −1 is the paper's
        decreasing schedule, or a list with one int per layer; see `tomesd.vit.schedule`. At most half
        of a layer's tokens merge, whatever r says. Where r is 0 for a layer, nothing merges there;
        0 for all of them leaves the model as it is, without a word, like a denoiser's ratio=0.
    speedup: instead of r, the smallest constant r that saves this factor of multiply-adds.
    prop_attn: proportional attention, + log(size) on the keys' logits. Switch it off for models
        pretrained as masked autoencoders and used off the shelf, where it costs accuracy.
    unmerge: give every token its group's value after the last layer, for heads and decoders that
        want all tokens. False hands on the merged ones: a mean over them no longer counts a group
        as often as it has members. What is collected between layers is unmerged as well where
        the host has a place for that: transformers' hidden states and feature maps are, timm's
        intermediates are not.
    features: what tells tokens apart: "k", "q", "v" (keys, queries, values), "x_pre" (the block's
        input) or "x" (after attention).
    heads: how the heads of q, k, v count: "mean" compares their average, "concatenate" all.
    combine: how a group becomes one token: "weighted" by sizes, plain "mean", "max", or "head",
        which keeps one of them.
    distance: how similarity is measured: "cosine", "dot", "euclidean" or "softmax".
    partition: which tokens may merge into which: "alternating", "sequential" or "random" halves.
    method: "bipartite" soft matching, or a rival that the paper measures it against: "greedy"
        matching, "kmeans", pruning random tokens ("prune_random") or those that get the least
        attention ("prune_attention"); or "energy", the later PiToMe. distance and partition count
        for the first alone; see `benchmarks.classifier.rivals`.
    kmeans_iterations: how often k-means assigns tokens to centres.
    seed: of all that is random.

    Re-entrant gradient checkpointing wants each forward's backward before the next forward.

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
    distance: str = "cosine"
    partition: str = "alternating"
    method: str = "bipartite"
    kmeans_iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not _fits(value, kind):
                raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
            # NumPy's numbers become Python's, as in denoisers' settings.
            object.__setattr__(self, name, kind(value))
        if self.speedup is not None:
            if not _fits(self.speedup, float):
                raise TypeError(f"speedup must be a number or None, got {self.speedup!r}")
            object.__setattr__(self, "speedup", float(self.speedup))
        object.__setattr__(self, "r", schedule.checked(self.r))
        if self.speedup is not None and self.r != 0:
            raise ValueError(f"r must not be given beside speedup, got r={self.r!r}")
        for name, allowed in _CHOICES.items():
            require_one_of(name, getattr(self, name), allowed)
        if self.kmeans_iterations < 1:
            raise ValueError(f"kmeans_iterations must be 1 or more, got {self.kmeans_iterations}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The features that `token_map` looks at."""
        return ("q", "k") if self.method == "prune_attention" else (self.features,)

    @property
    def only_mean_counts(self) -> bool:
        """Whether all that `token_map` looks at is the mean over heads."""
        return self.heads == "mean" and self.method != "prune_attention"

    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        """Which r tokens of a layer merge.

        features: what `needs` names, [B, N, H, D] each (H is 1 where there are no heads).
        prefix: how many leading tokens are protected. layer: of how many layers, from 0.
        """
        if self.method == "prune_attention":
            attention = rivals.received_attention(features["q"], features["k"], prefix)
            return rivals.attention_pruning(attention, prefix, r)
        metric = features[self.features]
        metric = metric.mean(2) if self.heads == "mean" else metric.flatten(2)
        batch, n, _ = metric.shape
        if self.method == "greedy":
            return rivals.greedy_matching(metric, prefix, r)
        if self.method == "kmeans":
            return rivals.kmeans(metric, prefix, r, self.kmeans_iterations)
        if self.method == "energy":
            return rivals.energy_matching(metric, prefix, r, margin=0.9 * (1 - layer / layers))
        if self.method == "prune_random":
            key = partition.make_key(self.seed, block=layer)
            dropped = partition.random(n, n_src=r, key=key, prefix=prefix, device=metric.device)
            return random_pruning(batch, n, dropped)
        sides = self._sides(n, prefix, layer, metric.device)
        return bipartite_soft_matching(metric, sides, r, self.distance)

    def _sides(self, n: int, prefix: int, layer: int, device: torch.device) -> Partition:
        if self.partition == "random":
            key = partition.make_key(self.seed, block=layer)
            return partition.random(n, key=key, prefix=prefix, device=device)
        halves = partition.alternating if self.partition == "alternating" else partition.sequential
        return halves(n, prefix=prefix, device=device)


_KINDS = {"prop_attn": bool, "unmerge": bool, "kmeans_iterations": int, "seed": int}
_CHOICES = {
    "features": FEATURES,
    "heads": HEADS,
    "combine": COMBINES,
    "distance": DISTANCES,
    "partition": PARTITIONS,
    "method": METHODS,
}


def vit_settings(settings: dict) -> ViTSettings:
    """Settings from `apply_patch`'s arguments."""
    known = [field.name for field in fields(ViTSettings)]
    for name in settings:
        require_one_of("setting", name, known, error=TypeError)
    if "r" not in settings and "speedup" not in settings:
        raise TypeError(
            "r (tokens to merge in each layer, for example r=8) or speedup must be given"
        )
    return ViTSettings(**settings)
