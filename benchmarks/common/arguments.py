"""The scripts' command lines: one `Command` for each, and argument types with clear errors."""

import shlex
import sys
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Generic, TypeVar

from tomesd.pictures import names

Prepared = TypeVar("Prepared")
Value = TypeVar("Value")

# What `prepare` raises for a wrong argument or a missing file or package.
USAGE_ERRORS = (ValueError, TypeError, OSError, ImportError)


@dataclass(frozen=True)
class Command(Generic[Prepared]):
    """What a script runs: its options, the checks before any work, and the work.

    >>> main = Command("cost", add_options, prepare, run)
    >>> main(["--model", "sd15"])

    name: of the script, without ".py".
    add_options: adds the script's options to a parser.
    prepare: checks the arguments and loads what the work needs; an error that it raises for them
        ends the script with status 2 and one line.
    run: does the work with what `prepare` returned; one of `failures` ends the script with its
        message alone.
    resumes: whether the same command resumes an interrupted run.
    """

    name: str
    add_options: Callable[[ArgumentParser], None]
    prepare: Callable[[Namespace], Prepared]
    run: Callable[[Prepared], None]
    resumes: bool = False
    failures: tuple[type[Exception], ...] = (FloatingPointError, OSError)

    def parser(self, doc: str | None = None) -> ArgumentParser:
        """The parser, described by all of a script's docstring but its first line."""
        parser = ArgumentParser(
            prog=f"{self.name}.py",
            description=(doc or "").partition("\n\n")[2],
            formatter_class=RawDescriptionHelpFormatter,
            epilog="Defaults are in parentheses.",
        )
        self.add_options(parser)
        return parser

    def __call__(self, argv: Sequence[str] | None = None, doc: str | None = None) -> None:
        """Parse, check, run. `args.command` is the command line as a shell takes it.

        argv: the arguments; None for those of the process. doc: the script's docstring.
        Raises SystemExit: status 2 for a wrong argument, 130 after Ctrl-C.
        """
        try:
            self._parse_and_run(argv, self.parser(doc))
        except KeyboardInterrupt:
            left = "the same command resumes" if self.resumes else "no partial files are left"
            print(f"stopped: {left}", file=sys.stderr)
            sys.exit(130)

    def _parse_and_run(self, argv: Sequence[str] | None, parser: ArgumentParser) -> None:
        args = parser.parse_args(argv)
        given = sys.argv[1:] if argv is None else argv
        args.command = shlex.join(["python", f"scripts/{self.name}.py", *given])
        try:
            prepared = self.prepare(args)
        except USAGE_ERRORS as error:
            parser.error(" ".join(str(error).split()))
        try:
            self.run(prepared)
        except self.failures as error:
            left = "\nFinished work is kept; the same command resumes." if self.resumes else ""
            sys.exit(f"{parser.prog}: {error}{left}")


def option_type(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """An option's type; argparse shows the message of its own errors only.

    >>> option_type(names.number(int, 1, 1000))("25")
    25
    """

    @wraps(parse)
    def convert(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error

    return convert


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    return option_type(names.number(kind, low, high))


size = option_type(names.size)
