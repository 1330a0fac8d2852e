"""tomesd report: which models of a pipeline merge, and at which sizes it pays."""

from typing import Any

import click

from tomesd.cli import options
from tomesd.cli.options import usage_errors
from tomesd.diffusion.settings import PRESETS


@click.command(
    name="report",
    short_help="Say what merges and where it pays.",
    epilog=f"Embedded pipelines: {options.EMBEDDED}.",
)
@click.argument("model", required=False)
@options.ratio
@click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="Which branches merge; all levels are listed anyway.",
)
@click.option(
    "--size",
    "sizes",
    type=options.size,
    multiple=True,
    help="Pixels, side or WxH; may be given several times.  [default: 1, 1.5 and 2 times "
    "the model's]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device of the estimate; it need not be present.",
)
def command(**given: Any) -> None:
    """Say which models of the pipeline MODEL merge, and at which sizes it pays.

    MODEL is an embedded pipeline (by default unet), a folder or a hub id. Only its configuration is
    read: no weights are loaded or downloaded. The estimate uses shapes and the rates of one CPU
    thread or of a GPU like an RTX 4090, for batch 2: one image with guidance.

    \b
    tomesd report stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda
    """
    with usage_errors():
        from tomesd.cli.sizes import denoisers, size_table
        from tomesd.diffusion.settings import diffusion_settings

        # All levels are listed, also those where it does not pay.
        every = {"max_downsample": 8, "only_where_it_pays": False}
        settings = diffusion_settings(given["ratio"], given["preset"], every)
        found = denoisers(given["model"])
    for name, part in found.items():
        click.echo(size_table(name, part, settings, given["sizes"] or part.sizes, given["device"]))
