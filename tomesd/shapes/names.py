"""The embedded pipelines by name. Imports nothing heavy, since every --help needs them."""

from pathlib import Path
from typing import NamedTuple

# In a wheel they are installed beside this file; in a clone they stay at its top level.
_INSTALLED, _IN_CLONE = (Path(__file__).resolve().parents[up] / "assets" for up in (0, 2))
ASSETS = _INSTALLED if _INSTALLED.exists() else _IN_CLONE


class Embedded(NamedTuple):
    """Where an embedded pipeline is in ASSETS, and how it samples by default."""

    folder: str
    steps: int = 25
    guidance: float = 4.0


DEFAULT = "unet"
PIPELINES = {
    DEFAULT: Embedded("pipeline"),
    "few-step": Embedded("few-step", steps=4),
    "transformer": Embedded("transformer"),
}


def available() -> list[str]:
    """The embedded pipelines whose weights are there.

    >>> available()[0]
    'unet'
    """
    return [name for name, each in PIPELINES.items() if (ASSETS / each.folder).is_dir()]
