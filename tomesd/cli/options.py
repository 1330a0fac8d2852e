"""Options that several commands have, and their types."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from tomesd.diffusion.settings import METHODS, PRESETS
from tomesd.pictures.names import PRECISIONS, SCHEDULERS

Function = TypeVar("Function", bound=Callable[..., Any])


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """An option's type: a number from low to high, both included.

    >>> number(int, 1, 1000)("25")
    25
    """

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise click.BadParameter(f"must be {noun} from {low} to {high}, got {text!r}")
        return value

    parse.__name__ = "integer" if kind is int else "number"  # What --help shows.
    return parse


def size(text: str) -> tuple[int, int]:
    """An option's type: width and height in pixels, multiples of 8.

    >>> size("128"), size("192x128")
    ((128, 128), (192, 128))
    """
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or any(side < 8 or side % 8 for side in sides):
        raise click.BadParameter(
            f"must be one side or WxH in positive multiples of 8 pixels, got {text!r}"
        )
    return sides[0], sides[-1]


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is raised for a wrong argument or a missing file is an error of usage: status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(str(error), click.get_current_context()) from error
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        raise click.UsageError(str(error), click.get_current_context()) from error


def several(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Options as one decorator, shown in this order by --help."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def output(default: str) -> Callable[[Function], Function]:
    return click.option(
        "--output",
        type=click.Path(path_type=Path),
        default=Path(default),
        show_default=True,
        help="PNG file, replaced if it exists; or a folder, where nothing is replaced.",
    )


ratio = click.option(
    "--ratio",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the tokens to merge; 0 changes nothing.",
)

preset = click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="late: every level where it pays, but not in the first fifth of the steps; steady: the "
    "finest level in every step; fast: every level where it pays, in every step; quality: keys and "
    "values only; paper: all branches and levels, as in ToMe's Appendix F.  [default: late, or "
    "steady with --levels or --since]",
)

method = click.option(
    "--method",
    type=click.Choice(METHODS),
    default="tome",
    show_default=True,
    help="Merge similar tokens, or drop random ones.",
)

levels = click.option(
    "--levels",
    type=click.Choice(["1", "2", "4", "8"]),
    help="Which levels of a UNet merge, by how much coarser than the finest one they may be: 1 is "
    "the finest only, 8 all.  [default: 1, or the preset's]",
)

since = click.option(
    "--since",
    type=number(float, 0, 0.999),
    help="Merge from this share of the steps on: 0.2 leaves the first fifth whole.",
)

model = click.option(
    "--model", help="Hub id or folder.  [default: the embedded pipeline, 128x128 px]"
)

seed = click.option(
    "--seed",
    type=number(int, 0, 2**32),
    default=0,
    show_default=True,
    help="Of the first image's noise.",
)

steps = click.option(
    "--steps",
    type=number(int, 1, 1000),
    help="Denoising steps.  [default: 25 of the embedded pipeline, others have their own]",
)

sampling = several(
    click.option(
        "--scheduler", type=click.Choice(list(SCHEDULERS)), help="[default: the pipeline's]"
    ),
    steps,
    click.option(
        "--guidance",
        type=number(float, 0, 100),
        help="Scale of the guidance.  [default: 4 of the embedded pipeline, others have their own]",
    ),
    click.option("--size", type=size, help="Pixels, one side or WxH.  [default: the model's]"),
    seed,
    click.option("--device", help="cuda, mps or cpu.  [default: the first available]"),
    click.option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="[default: bf16 or, where there is none, fp16 on cuda; fp32 elsewhere]",
    ),
)
