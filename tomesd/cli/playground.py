"""tomesd playground: the page in the browser."""

import click

from tomesd.cli import options
from tomesd.cli.options import number, usage_errors


@click.command(name="playground")
@options.model
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=number(int, 0, 65535), help="[default: the first free one from 7860 on]"
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def command(model: str | None, host: str, port: int | None, opens: bool) -> None:
    """Try token merging in the browser.

    Everything runs on this machine and nothing is sent anywhere. Only this machine can open the
    page, unless --host says otherwise.
    """
    with usage_errors():
        from tomesd.app.serve import serve

        serve(model, host, port, opens)
