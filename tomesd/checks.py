"""Checks of arguments, whose errors name the argument, its value and what is allowed."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def require_type(name: str, value: Any, kind: type) -> Any:
    """The value as that type, if it is one; NumPy's numbers are, but a bool is not a number.

    >>> require_type("window", 32, int)
    32

    Raises TypeError for any other type.
    """
    number = {float: Real, int: Integral}.get(kind)
    fits = isinstance(value, kind if number is None else number)
    if not fits or (number is not None and isinstance(value, bool)):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
    # Python's own numbers: a compiler would trace NumPy's as tensors.
    return kind(value)


def require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise TypeError unless the value is an int, ValueError unless it is in range.

    >>> require_int("sx", 2, 1)
    """
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, {allowed}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def require_one_of(
    name: str, value: Any, allowed: Iterable[Any], error: type[Exception] = ValueError
) -> None:
    """Raise unless the value is among the allowed ones.

    >>> require_one_of("method", "tome", ("tome", "prune"))
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise error(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
