"""What the tests share: how properties are tried, and the names that examples take for granted."""

import os

import pytest
import torch
from hypothesis import settings

import tomesd
from tomesd import matching, partition

# Workers side by side (pytest -n auto) share the cores, and so do the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples in every run, so that a red run is the change's fault; no deadline, since the
# first example of a test pays for what torch loads late.
settings.register_profile(
    "tomesd", max_examples=100, deadline=None, derandomize=True, database=None
)
settings.load_profile("tomesd")


@pytest.fixture(scope="session", autouse=True)
def _names_of_examples(doctest_namespace: dict) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace["tomesd"] = tomesd
    for module, names in (
        (tomesd, tomesd.__all__),
        (matching, ("bipartite_soft_matching", "random_pruning")),
        (partition, ("Partition", "alternating", "make_key", "random", "sequential", "strided")),
    ):
        doctest_namespace.update({name: getattr(module, name) for name in names})
