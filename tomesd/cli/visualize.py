"""tomesd visualize: which tokens merged, drawn over an image."""

from pathlib import Path
from typing import Any

import click

from tomesd.cli import options
from tomesd.cli.options import number, option_type, usage_errors


@option_type
def layers(text: str) -> list[int]:
    """Numbers of layers.

    >>> layers("0,5,11")
    [0, 5, 11]
    """
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"must be whole numbers separated by commas, got {text!r}")
    return [int(part) for part in text.split(",")]


@click.command(name="visualize", short_help="Draw which tokens merge.")
@click.argument("image", required=False, type=click.Path(path_type=Path))
@click.option(
    "--model",
    help="timm:NAME, torchvision:NAME or a transformers folder; with --prompt an embedded pipeline "
    f"({options.EMBEDDED}), a folder or a hub id.  [default: the embedded ones]",
)
@click.option(
    "--r", type=number(int, 1, 10_000), help="Tokens to merge in each layer.  [default: 8]"
)
@click.option("--layers", type=layers, help="Layers to draw, as 0,5,11.  [default: four]")
@click.option("--prompt", help="Draw the merged tokens of an image made from this prompt.")
@click.option(
    "--ratio", type=float, help="With --prompt: share of the tokens to merge.  [default: 0.5]"
)
@click.option("--steps", type=number(int, 1, 1000), help="With --prompt: denoising steps.")
@options.seed
@options.output("runs/visualize")
def command(**given: Any) -> None:
    """Draw which tokens merge in a classifier, or in a pipeline's denoiser.

    Patches of IMAGE (by default a drawn one) that a Vision Transformer merged into one token are
    filled with their average color and share a border color, after several layers (ToMe, Figure 4).
    With --prompt, an image is generated instead, and drawn with the merged tokens of several steps
    and each block.

    \b
    tomesd visualize photo.png --model timm:vit_base_patch16_224 --r 16
    tomesd visualize --prompt "a photo of a red heart"
    """
    with usage_errors():
        from tomesd.cli import drawings

        drawings.check(given)
        page, metadata = drawings.draw(given)
    from tomesd.pictures.files import destination, save_image, versions

    path = destination(given["output"])
    save_image(page, path, metadata | versions("tomesd", "torch"))
    click.echo(str(path))
