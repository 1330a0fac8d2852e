"""tomesd generate: images with merged tokens."""

from pathlib import Path
from typing import Any

import click

from tomesd.cli import options
from tomesd.cli.options import number, usage_errors


@click.command(name="generate")
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A text file with one prompt per line, instead of PROMPT.",
)
@options.ratio
@options.since
@options.levels
@options.preset
@options.method
@options.model
@options.sampling
@click.option(
    "--num-images",
    type=number(int, 1, 100_000),
    default=1,
    show_default=True,
    help="Images per prompt, with seeds SEED, SEED + 1, ...",
)
@click.option(
    "--img2img",
    type=click.Path(path_type=Path),
    help="Start from this image, scaled and cropped to the size, instead of pure noise.",
)
@click.option(
    "--strength",
    type=number(float, 0.01, 1),
    help="With --img2img: how much to change the image; 1 ignores it.  [default: 0.8]",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Compile the denoiser; the first image takes longer.",
)
@options.output("runs/generate")
@click.option("--save-map", is_flag=True, help="Also draw which tokens merged, in NAME-map.png.")
@click.option("--report", is_flag=True, help="Print how many tokens merged where.")
def command(**given: Any) -> None:
    """Make images of PROMPT with merged tokens.

    Images are PNG files with their settings as metadata. Times are from the prompt to the pixels;
    the first one includes warm-up.

    \b
    tomesd generate "a photo of a red heart on a blue striped background" --ratio 0.5
    tomesd generate --prompts prompts.txt --model stabilityai/sdxl-turbo --levels 8 --since 0.2
    """
    with usage_errors():
        from tomesd.cli.images import prepare

        images = prepare(given)
    images.make()
