"""Which tokens of a Vision Transformer's layer merge, and into what."""

from torch import Tensor

from tomesd.core import partition
from tomesd.core.matching import bipartite_soft_matching
from tomesd.core.order import destinations_last
from tomesd.core.partition import Partition
from tomesd.core.rows import fixed
from tomesd.core.token_map import TokenMap

# What a layer gives to the next: see `ViTSettings`.
ORDERS = ("positions", "concatenated")
DEFAULT_ORDER = "positions"


class Matcher:
    """The paper's default: keys, averaged over heads, in alternating halves; size-weighted means.

    >>> keys = torch.randn(2, 10, 3, 8)
    >>> Matcher().token_map({"k": keys}, prefix=1, r=4, layer=0, layers=12).m
    6

    A benchmark can pass another one to the patch. needs: the features that `token_map` reads: "q",
    "k", "v", "x_pre" (the block's input) or "x" (after attention). averages_heads: whether it reads
    only their mean over heads, which some hosts can compute faster.
    """

    order = DEFAULT_ORDER
    needs: tuple[str, ...] = ("k",)
    averages_heads = True

    def __init__(self, order: str = DEFAULT_ORDER):
        self.order = order

    def token_map(
        self, features: dict[str, Tensor], prefix: int, r: int, layer: int, layers: int
    ) -> TokenMap:
        """The map that merges r tokens of a layer.

        features: those that `needs` names, [B, N, H, D] each. prefix: how many leading tokens are
        protected. layer: its index among so many layers.
        """
        metric = features["k"].mean(2)
        n = fixed(metric.shape[1])
        sides = partition.alternating(n, prefix=prefix, device=metric.device)
        return self.ordered(bipartite_soft_matching(metric, sides, r), sides)

    def ordered(self, token_map: TokenMap, sides: Partition) -> TokenMap:
        """The map with its groups in the order in which the next layer gets them."""
        return destinations_last(token_map, sides) if self.order == "concatenated" else token_map

    def merge(self, token_map: TokenMap, x: Tensor, size: Tensor) -> Tensor:
        """Merge tokens [B, N, C] that stand for so many tokens each, [B, N, 1]."""
        # A group of masked tokens alone has size zero, and needs some weight to be averaged.
        return token_map.merge(x, weight=size.clamp(min=1e-6))
