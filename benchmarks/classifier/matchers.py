"""Matchers for Vision Transformers that are only measured: the choices of ToMe's Table 1, and the
algorithms of its Table 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.classifier import rivals
from benchmarks.classifier.distances import matching_by_distance, sequential
from tomesd import registry
from tomesd.core import partition
from tomesd.core.matching import random_pruning
from tomesd.core.partition import Partition
from tomesd.core.token_map import TokenMap
from tomesd.vit import ViT, ViTPatch
from tomesd.vit.matcher import Matcher
from tomesd.vit.settings import ViTSettings


@dataclass(frozen=True)
class AblationMatcher(Matcher):
    """Bipartite matching with the choices of ToMe's Table 1; the defaults are the paper's.

    >>> AblationMatcher(features="x_pre").needs
    ('x_pre',)

    features: "q", "k", "v", "x_pre" (the block's input) or "x" (after attention).
    heads: "mean" or "concatenate". distance: see `matching_by_distance`.
    partition: "alternating", "sequential" or "random". combine: "weighted" (by size), or `how` of
        `TokenMap.merge`.
    """

    features: str = "k"
    heads: str = "mean"
    distance: str = "cosine"
    partition: str = "alternating"
    combine: str = "weighted"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.features,)

    @property
    def averages_heads(self) -> bool:  # type: ignore[override]
        return self.heads == "mean"

    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        metric = features[self.features]
        metric = metric.mean(2) if self.heads == "mean" else metric.flatten(2)
        sides = self._sides(metric, prefix, layer)
        return self.ordered(matching_by_distance(metric, sides, r, self.distance), sides)

    def _sides(self, metric: Tensor, prefix: int, layer: int) -> Partition:
        n, device = metric.shape[1], metric.device
        if self.partition == "random":
            key = partition.make_key(0, block=layer)
            return partition.random(n, key=key, prefix=prefix, device=device)
        halves = partition.alternating if self.partition == "alternating" else sequential
        return halves(n, prefix=prefix, device=device)

    def merge(self, token_map: TokenMap, x: Tensor, size: Tensor) -> Tensor:
        if self.combine == "weighted":
            return super().merge(token_map, x, size)
        return token_map.merge(x, how=self.combine)


class GreedyMatcher(Matcher):
    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        return rivals.greedy_matching(features["k"].mean(2), prefix, r)


class KMeansMatcher(Matcher):
    def __init__(self, kmeans_iterations: int = 2):
        self.iterations = kmeans_iterations

    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        return rivals.kmeans(features["k"].mean(2), prefix, r, self.iterations)


class EnergyMatcher(Matcher):
    """PiToMe, with its margin that decreases from layer to layer."""

    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        margin = 0.9 * (1 - layer / layers)
        return rivals.energy_matching(features["k"].mean(2), prefix, r, margin)


class RandomPruner(Matcher):
    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        batch, n = features["k"].shape[:2]
        key = partition.make_key(0, block=layer)
        device = features["k"].device
        dropped = partition.random(n, n_src=r, key=key, prefix=prefix, device=device)
        return random_pruning(batch, n, dropped)


class AttentionPruner(Matcher):
    needs = ("q", "k")
    averages_heads = False

    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        attention = rivals.received_attention(features["q"], features["k"], prefix)
        return rivals.attention_pruning(attention, prefix, r)


MATCHERS: dict[str, type[Matcher]] = {
    "bipartite": AblationMatcher,
    "greedy": GreedyMatcher,
    "kmeans": KMeansMatcher,
    "energy": EnergyMatcher,
    "prune_random": RandomPruner,
    "prune_attention": AttentionPruner,
}


@contextmanager
def merging(model: Any, options: dict[str, Any]) -> Iterator[ViTPatch]:
    """Merge tokens in a classifier inside a `with` block; gives its patch.

    >>> with merging(model, {"r": 8, "method": "kmeans"}) as patch:
    ...     logits = model(pixels)

    options: r, prop_attn and order as for `apply_patch`; method: a name of MATCHERS, whose other
        arguments are the remaining options. Without any of them it is the library's own matcher.
    Raises TypeError for a model that does not contain a supported Vision Transformer.
    """
    own = {name: value for name, value in options.items() if name in ("r", "prop_attn", "order")}
    choices = {name: value for name, value in options.items() if name not in own}
    matcher = MATCHERS[choices.pop("method", "bipartite")](**choices) if choices else None
    spec, target = _find_vit(model)
    patch = ViTPatch(spec, target, ViTSettings(**own), matcher=matcher)
    patch.install()
    try:
        yield patch
    finally:
        patch.remove()


def _find_vit(model: Any) -> tuple[ViT, Any]:
    for module in model.modules():
        spec = registry.find(module)
        if isinstance(spec, ViT):
            return spec, module
    raise TypeError(
        f"model must contain a Vision Transformer of tomesd.supported(), got {type(model).__name__}"
    )
