"""Markdown tables, and how their figures are written."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "–"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["r", "accuracy"], [["8", "97.5"]]))
    | r | accuracy |
    |---|---|
    | 8 | 97.5 |
    """
    lines = [_line(headings), "|---" * len(headings) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(value: float | None, digits: int, times: float = 1) -> str:
    """A number with so many decimals, multiplied by `times`; a dash for None.

    >>> figure(0.9756, 1, times=100), figure(None, 1)
    ('97.6', '–')
    """
    return MISSING if value is None else f"{value * times:.{digits}f}"


def spread(value: Mapping[str, float] | None, digits: int, times: float = 1, unit: str = "") -> str:
    """A median with its quartiles, as `timing.Spread` has them; a dash for None.

    >>> spread({"median": 1.19, "low": 1.17, "high": 1.2}, 2)
    '1.19 (1.17–1.20)'
    """
    if value is None:
        return MISSING
    median, low, high = (f"{times * value[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median}{unit} ({low}–{high})"


def settings_list(settings: Mapping[str, Any]) -> str:
    """A bullet for each setting that is not None.

    >>> print(settings_list({"steps": 25, "versions": {"torch_version": "2.14"}}))
    - steps: 25
    - versions: torch=2.14
    """
    return "\n".join(
        f"- {_short(name)}: {_text(value)}" for name, value in settings.items() if value is not None
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_short(name)}={item}" for name, item in value.items())
    return str(value)


def _short(name: str) -> str:
    return name.removesuffix("_version")
