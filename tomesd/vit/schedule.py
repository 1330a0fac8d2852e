"""How many tokens merge in each layer of a Vision Transformer."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

Schedule = int | tuple[int, float] | list[int]


def per_layer(r: Schedule, layers: int) -> list[int]:
    """How many tokens each layer should merge.

    >>> per_layer((8, -1), layers=5)
    [16, 12, 8, 4, 0]

    r: a number of tokens: the same in every layer, the best choice for an unknown model (ToMe,
        Figure 2). (r, inflection): r on average, on a line from r·(1 − inflection) in the first
        layer to r·(1 + inflection) in the last; −1 is the paper's decreasing schedule, faster and a
        little less accurate at the same r. A list: one number per layer.
    layers: how many layers there are.

    Raises TypeError and ValueError as `checked` does, and ValueError unless a list has one number
    per layer. Source: ToMe, section 3, "Merging Schedule".
    """
    r = checked(r)
    if isinstance(r, tuple):
        mean, inflection = r
        # Its ends are whole numbers, as in the paper's code.
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / max(1, layers - 1)
        return [int(first + step * i) for i in range(layers)]
    if isinstance(r, list):
        if len(r) != layers:
            raise ValueError(f"r must have one number for each of {layers} layers, got {r!r}")
        return r
    return [r] * layers


def checked(r: Schedule) -> Schedule:
    """The schedule in Python's own numbers, also if they were NumPy's.

    >>> checked((8, -1))
    (8, -1.0)

    Raises TypeError if a number of tokens is not an int or the inflection not a number, ValueError
    if r is negative, the inflection is not from −1 to 1, or a tuple is not (r, inflection).
    """
    if isinstance(r, list):
        return [_tokens(value, r) for value in r]
    if not isinstance(r, tuple):
        return _tokens(r, r)
    if len(r) != 2:
        raise ValueError(f"r as a tuple must be (r, inflection), got {r!r}")
    mean, inflection = r
    if isinstance(inflection, bool) or not isinstance(inflection, Real):
        raise TypeError(f"r's inflection must be a number from -1 to 1, got {r!r}")
    if not -1 <= inflection <= 1:
        raise ValueError(f"r's inflection must be from -1 to 1, got {r!r}")
    return _tokens(mean, r), float(inflection)


def clipped(r: int, tokens: int, prefix: int) -> int:
    """How many of r tokens can merge in one layer: at most half of those that are not protected.

    >>> clipped(16, tokens=21, prefix=1)
    10

    prefix: how many tokens are protected. Source: ToMe, Appendix D.
    """
    return min(r, (tokens - prefix) // 2)


def tokens_after(schedule: Sequence[int], tokens: int, prefix: int) -> list[int]:
    """How many tokens are left after each layer.

    >>> tokens_after([8, 8, 8], tokens=21, prefix=1)
    [13, 7, 4]
    """
    left = []
    for r in schedule:
        tokens -= clipped(r, tokens, prefix)
        left.append(tokens)
    return left


class Cost(NamedTuple):
    """What one layer costs, in multiply-adds.

    attention: of the projections, per token. pairs: of attention, per query–key pair. mlp: per
    token that is left after merging.
    """

    attention: int
    pairs: int
    mlp: int

    def of(
        self, schedule: Sequence[int], tokens: int, prefix: int, within_blocks: bool = False
    ) -> int:
        """Of all layers. within_blocks: each gets all tokens and merges them for itself.

        >>> Cost(attention=4, pairs=2, mlp=8).of([0], tokens=3, prefix=1)
        54
        """
        if within_blocks:
            kept = [tokens - clipped(r, tokens, prefix) for r in schedule]
            return sum((self.attention + self.mlp) * m + self.pairs * m**2 for m in kept)
        total = 0
        for left in tokens_after(schedule, tokens, prefix):
            total += self.attention * tokens + self.pairs * tokens**2 + self.mlp * left
            tokens = left
        return total


def for_speedup(
    speedup: float,
    cost: Cost,
    layers: int,
    tokens: int,
    prefix: int,
    within_blocks: bool = False,
) -> int:
    """The smallest constant r with which the layers cost at most 1/speedup as much as unmerged.

    >>> vit_b = Cost(attention=4 * 768**2, pairs=2 * 768, mlp=8 * 768**2)
    >>> for_speedup(2.0, vit_b, layers=12, tokens=197, prefix=1)
    16

    speedup: 1 or more, in multiply-adds, not time: that also depends on the machine, and on
        matching and merging themselves. The other arguments: see `Cost.of`.

    Raises ValueError if speedup is below 1, or above what merging half of the tokens in every layer
    gives.
    """
    if speedup < 1:
        raise ValueError(f"speedup must be 1 or more, got {speedup}")
    full = cost.of([0] * layers, tokens, prefix, within_blocks)
    largest = (tokens - prefix) // 2
    for r in range(largest + 1):
        reached = full / cost.of([r] * layers, tokens, prefix, within_blocks)
        if reached >= speedup:
            return r
    raise ValueError(
        f"speedup must be at most {reached:.4g} for {layers} layers of {tokens} tokens, "
        f"got {speedup}"
    )


def _tokens(value: Any, r: Schedule) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            "r must be an int (tokens to merge in each layer), (r, inflection), or a list with an "
            f"int for each layer, got {r!r}"
        )
    if value < 0:
        raise ValueError(f"r must be 0 or more, got {r!r}")
    return int(value)
