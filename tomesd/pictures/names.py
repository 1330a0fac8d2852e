"""What options take: names, numbers and sizes. Imports nothing, since every --help needs it."""

from collections.abc import Callable
from typing import Any

DEVICES = ("cuda", "mps", "cpu")

# And what torch calls them.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# The class of each scheduler, and its settings beside the pipeline's own noise schedule.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    # ToMe, Appendix F: pseudo linear multistep, without the Runge-Kutta steps at the start.
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from low to high, both included.

    >>> number(int, 1, 1000)("25")
    25

    The parser raises ValueError for anything else.
    """

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise ValueError(f"must be {noun} from {low} to {high}, got {text!r}")
        return value

    parse.__name__ = "integer" if kind is int else "number"  # What --help shows.
    return parse


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, multiples of 8.

    >>> size("128"), size("192x128")
    ((128, 128), (192, 128))

    Raises ValueError for anything else.
    """
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or any(side < 8 or side % 8 for side in sides):
        raise ValueError(f"must be one side or WxH in positive multiples of 8 pixels, got {text!r}")
    return sides[0], sides[-1]
