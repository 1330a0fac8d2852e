"""Options that several commands have, and their types."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from tomesd.diffusion.settings import METHODS, PRESETS
from tomesd.pictures import names
from tomesd.pictures.names import PRECISIONS, SCHEDULERS
from tomesd.shapes.names import DEFAULT, available

Function = TypeVar("Function", bound=Callable[..., Any])
Value = TypeVar("Value")


def option_type(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """An option's type; click shows the message of its own errors only.

    >>> option_type(names.number(int, 1, 1000))("25")
    25
    """

    @wraps(parse)
    def convert(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return convert


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    return option_type(names.number(kind, low, high))


size = option_type(names.size)


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
        help="A PNG file, replaced if it exists, or a folder, in which nothing is replaced.",
    )


ratio = click.option(
    "--ratio",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the tokens to merge; 0: none.",
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
    help="tome: merge similar tokens; prune: drop random ones.",
)

levels = click.option(
    "--levels",
    type=click.Choice(["1", "2", "4", "8"]),
    help="Which levels of a UNet merge, by how much coarser they are than the finest one: 1 is "
    "only the finest, 8 all.  [default: 1, or the preset's]",
)

since = click.option(
    "--since",
    type=number(float, 0, 0.999),
    help="Share of the steps at the start in which nothing merges, such as 0.2.",
)

# The embedded pipelines, as help texts name them.
EMBEDDED = ", ".join(available())

model = click.option(
    "--model",
    help=f"An embedded pipeline of 128x128 px ({EMBEDDED}), a folder or a hub id.  "
    f"[default: {DEFAULT}]",
)

seed = click.option(
    "--seed",
    type=number(int, 0, 2**32),
    default=0,
    show_default=True,
    help="Seed of the first image's noise.",
)

steps = click.option(
    "--steps",
    type=number(int, 1, 1000),
    help="Denoising steps.  [default: the model's]",
)

sampling = several(
    click.option(
        "--scheduler", type=click.Choice(list(SCHEDULERS)), help="[default: the pipeline's]"
    ),
    steps,
    click.option(
        "--guidance",
        type=number(float, 0, 100),
        help="Guidance scale.  [default: the model's]",
    ),
    click.option("--size", type=size, help="Pixels, side or WxH.  [default: the model's]"),
    seed,
    click.option("--device", help="cuda, mps or cpu.  [default: the first available]"),
    click.option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="[default: on cuda bf16, or fp16 if it has no bf16; elsewhere fp32]",
    ),
)
