"""The experiments of scripts/classify.py: each is one way to merge."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tomesd.vit import schedule
from tomesd.vit.matcher import ORDERS

PARTS = ("sweep", "ablation", "algorithms", "schedules", "orders")
# Parts that compare accuracies alone, without a speed.
UNTIMED = PARTS[3:]

# ToMe, Table 1: a choice, and the options of `matchers.merging` that differ from the defaults.
ABLATION: dict[str, dict[str, Any]] = {
    "default: K, cosine, mean, weighted, alternating": {},
    "features: block input": {"features": "x_pre"},
    "features: after attention": {"features": "x"},
    "features: Q": {"features": "q"},
    "features: V": {"features": "v"},
    "distance: Euclidean": {"distance": "euclidean"},
    "distance: dot": {"distance": "dot"},
    "distance: softmax": {"distance": "softmax"},
    "heads: concatenate": {"heads": "concatenate"},
    "combine: keep one": {"combine": "head"},
    "combine: max": {"combine": "max"},
    "combine: average": {"combine": "mean"},
    "partition: sequential": {"partition": "sequential"},
    "partition: random": {"partition": "random"},
    "proportional attention: off": {"prop_attn": False},
}

# ToMe, Table 2, and PiToMe's energy score.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "prune random": {"method": "prune_random"},
    "prune by attention": {"method": "prune_attention"},
    "k-means, 2 iterations": {"method": "kmeans"},
    "k-means, 5 iterations": {"method": "kmeans", "kmeans_iterations": 5},
    "greedy matching": {"method": "greedy"},
    "bipartite matching": {},
    "PiToMe": {"method": "energy"},
}


@dataclass(frozen=True)
class Experiment:
    """One way to merge, a row of a table.

    options: of `matchers.merging`. timed: whether its throughput is measured.
    """

    part: str
    name: str
    options: dict[str, Any]
    timed: bool = True

    @property
    def key(self) -> str:
        """Experiments with the same key have the same results."""
        return json.dumps(self.options, sort_keys=True)


def experiments(
    parts: Iterable[str], values: Sequence[int], r: int, layers: int, schedules: int
) -> list[Experiment]:
    """All experiments of these parts.

    >>> [each.name for each in experiments(["sweep"], [0, 8], 8, 12, 0)]
    ['r = 0', 'r = 8']

    values: r in the sweep, and with each order of the tokens. r: in the ablation and of the
        algorithms. schedules: the number of random ones, which merge between a quarter and all of
        the largest value's tokens.
    """
    found = []
    if "sweep" in parts:
        found += [Experiment("sweep", f"r = {value}", {"r": value}) for value in values]
    for part, table in (("ablation", ABLATION), ("algorithms", ALGORITHMS)):
        if part in parts:
            found += [Experiment(part, name, {"r": r} | how) for name, how in table.items()]
    if "schedules" in parts:
        found += _schedules(values, layers, schedules)
    if "orders" in parts:
        found += [
            Experiment("orders", f"r = {value}, {order}", {"r": value, "order": order}, timed=False)
            for value in values
            for order in ORDERS
        ]
    return found


def _schedules(values: Sequence[int], layers: int, count: int) -> list[Experiment]:
    """Constant and decreasing schedules of each value, and random ones (ToMe, Figure 7)."""
    chosen: dict[str, Any] = {}
    for value in values:
        chosen[f"constant {value}"] = value
        chosen[f"decreasing {value}"] = schedule.per_layer((value, -1), layers)
    generator = random.Random(0)
    for index in range(count):
        total = round(layers * max(values) * generator.uniform(0.25, 1))
        shares = [generator.expovariate(1) for _ in range(layers)]
        chosen[f"random {index}"] = [round(total * share / sum(shares)) for share in shares]
    return [Experiment("schedules", name, {"r": r}, timed=False) for name, r in chosen.items()]
