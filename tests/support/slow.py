"""The `slow` marker: `pytest` leaves out what has it, `pytest -m slow` runs that alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

slow = pytest.mark.slow


def slow_but(sample: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of which only a sample is in the default run; the others are slow."""
    return [value if value in sample else pytest.param(value, marks=slow) for value in values]
