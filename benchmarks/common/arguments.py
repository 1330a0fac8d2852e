"""The scripts' command lines: how they look, and types whose errors say what is allowed."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable


def run_script(main: Callable[[], None], goes_on: bool = False) -> None:
    """Run a script's main; Ctrl-C ends it with what is left behind, and no traceback.

    >>> run_script(lambda: print("done"))
    done

    goes_on: whether the same command takes up what an interrupted one has done.
    Raises SystemExit with status 130, the usual one, when interrupted.
    """
    try:
        main()
    except KeyboardInterrupt:
        left = "what is done stays; the same command goes on"
        print(f"stopped: {left if goes_on else 'no file is left half-written'}", file=sys.stderr)
        sys.exit(130)


def script_parser(doc: str | None) -> ArgumentParser:
    """A parser that is described by all of a script's docstring but its first line.

    >>> script_parser("Pictures: python scripts/generate.py\\n\\nWith any model.").description
    'With any model.'
    """
    return ArgumentParser(
        description=(doc or "").partition("\n\n")[2],
        formatter_class=RawDescriptionHelpFormatter,
        epilog="What is used if an option is not given stands in brackets.",
    )


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included.

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
            raise ArgumentTypeError(f"must be {noun} from {low} to {high}, got {text!r}")
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """An argparse type: width and height in pixels, which pipelines want in multiples of 8.

    >>> size("128"), size("192x128")
    ((128, 128), (192, 128))
    """
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or any(side < 8 or side % 8 for side in sides):
        raise ArgumentTypeError(
            f"must be one side or WxH in positive multiples of 8 pixels, got {text!r}"
        )
    return sides[0], sides[-1]
