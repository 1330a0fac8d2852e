"""The command `tomesd`: its subcommands, and how errors end it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

import tomesd

# Each is the attribute `command` of the module with its name.
COMMANDS = ("generate", "compare", "report", "visualize", "playground")

# The extra that installs a package.
EXTRAS = {
    **dict.fromkeys(("accelerate", "diffusers", "numpy", "PIL", "transformers"), "diffusion"),
    **dict.fromkeys(("timm", "torchvision"), "vit"),
    "gradio": "app",
}


class Commands(click.Group):
    """Imports the module of a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"tomesd.cli.{name}").command
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tomesd.__version__)
def group() -> None:
    """Token merging for diffusion models and Vision Transformers.

    By default the embedded models are used: nothing is downloaded. Shell completion for bash (or
    zsh, fish): eval "$(_TOMESD_COMPLETE=bash_source tomesd)".
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command; an error ends it with one line.

    >>> main(["generate", "a photo of a red heart", "--ratio", "0.5"])

    args: None for those of the process.
    Raises SystemExit: 0 if all went well, 2 for a wrong argument or a missing file or package, 1
    for what failed later, 130 after Ctrl-C.
    """
    try:
        status = group.main(args, prog_name="tomesd", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        name = getattr(getattr(error, "ctx", None), "command_path", "tomesd")
        fail(name, error.format_message(), error.exit_code)
    except click.Abort:
        fail("tomesd", "stopped; no partial files are left", 130)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        fail("tomesd", f"{error.name} must be installed: pip install 'tomesd[{extra}]'", 2)
    except (FloatingPointError, OSError) as error:
        fail("tomesd", str(error), 1)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        fail("tomesd", "out of memory: use a smaller size or a lower precision", 1)
    sys.exit(status if isinstance(status, int) else 0)


def fail(name: str, message: str, status: int) -> NoReturn:
    click.echo(f"{name}: error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def ran_out(error: RuntimeError) -> bool:
    """Whether memory ran out; on the CPU, torch raises a plain RuntimeError."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
