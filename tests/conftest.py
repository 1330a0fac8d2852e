"""What the tests share: threads, and how properties are tried."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.support.slow import beyond_the_sample, is_variant, slow

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Here and in the processes that are started: the number of threads touches the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are families outside the sample, and all but a few of a test's many cases."""
    for item in items:
        parts = set(item.path.parts)
        if "benchmarks" in parts:
            # These make many pictures or train, in processes of their own.
            if parts & {"fid", "frontier", "training"}:
                item.add_marker(slow)
        elif "reference" not in item.nodeid and item.path.stem != "test_errors":
            values = getattr(item, "callspec", None)
            if values and any(is_variant(value) for value in values.params.values()):
                item.add_marker(slow)
    for item in beyond_the_sample(items):
        item.add_marker(slow)
