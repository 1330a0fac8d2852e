"""By which features of tokens a matcher compares them."""

import pytest
import torch
from torch import Tensor

from tests.support.tiny_vits import Vit, build
from tests.support.tiny_vits_rotary import EVA
from tests.support.vit_reference import features, merge_into
from tests.vit.test_families import kinds
from tests.vit.test_threads import assert_alike, batches, inside
from tomesd import registry
from tomesd.core.matching import bipartite_soft_matching
from tomesd.core.partition import alternating
from tomesd.vit import ViTPatch
from tomesd.vit.matcher import Matcher
from tomesd.vit.settings import ViTSettings


class Comparing(Matcher):
    """Compares tokens by one feature, of all heads or averaged over them."""

    def __init__(self, feature: str, heads: str):
        self.needs, self.feature, self.heads = (feature,), feature, heads
        self.averages_heads = heads == "mean"

    def token_map(self, features, prefix, r, layer, layers):
        feature = features[self.feature]
        metric = feature.mean(2) if self.heads == "mean" else feature.flatten(2)
        sides = alternating(metric.shape[1], prefix=prefix)
        return bipartite_soft_matching(metric, sides, r)


def _first_block(vit: Vit, matcher: Matcher | None) -> tuple[Tensor, Tensor]:
    """What goes into the first block, and in which groups it comes out."""
    seen = {}
    vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0]))
    encoder = next(m for m in vit.model.modules() if registry.find(m))
    patch = ViTPatch(registry.find(encoder), encoder, ViTSettings(r=[5, 0, 0]), matcher=matcher)
    patch.install()
    vit.output()
    group = patch.forward.maps[1].group
    patch.remove()
    return seen["first"], group


@kinds
@pytest.mark.parametrize(
    ("which", "heads"),
    [("k", ""), ("k", "all"), *((name, "mean") for name in ("x_pre", "x", "q", "v")), ("v", "all")],
)
@torch.no_grad()
def test_tokens_are_compared_by_their_keys_or_by_what_a_matcher_asks_for(name, which, heads):
    vit = build(name)
    if which == "v" and name in EVA:
        pytest.skip("no module gives its values")
    first, group = _first_block(vit, Comparing(which, heads) if heads else None)
    for tokens, got in zip(first, group, strict=True):
        feature = features(tokens, vit.reference[0])[which]
        metric = feature.transpose(0, 1).flatten(1) if heads == "all" else feature.mean(0)
        into = merge_into(metric[: len(tokens) - vit.suffix], 5, vit.prefix)
        stay = [i for i in range(len(tokens)) if i not in into]
        assert got.tolist() == [stay.index(into.get(i, i)) for i in range(len(tokens))]


@pytest.mark.parametrize("feature", ["x_pre", "x", "q", "v"])
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_threads_compare_tokens_by_their_own_features(name, feature):
    vit = build(name)
    settings, matcher = ViTSettings(r=[3, 0, 9]), Comparing(feature, "mean")
    ViTPatch(registry.find(vit.model), vit.model, settings, matcher=matcher).install()
    assert_alike(batches(vit), inside(vit))
