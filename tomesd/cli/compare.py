"""tomesd compare: one image of many, with each method at each ratio."""

from typing import Any

import click

from tomesd.cli import options
from tomesd.cli.options import usage_errors


@click.command(name="compare", short_help="Compare merging with random pruning in one figure.")
@click.argument("prompt")
@options.preset
@options.model
@options.sampling
@options.output("runs/generate")
def command(**given: Any) -> None:
    """Compare merging with random pruning, at ratios from 0 to 0.6.

    One figure with a row for each method and a column for each ratio, each cell with its time: one
    run after a warm-up, which shows large effects, but not a few percent.

    \b
    tomesd compare "a photo of a red heart on a blue striped background"
    """
    with usage_errors():
        from tomesd.cli import job
        from tomesd.diffusion.settings import diffusion_settings

        merging = diffusion_settings(0.5, given["preset"], {})
        made = job.load(given)
        import tomesd
        from tomesd.targets import default_preset

        preset = given["preset"] or default_preset(made.pipe)
        tomesd.apply_patch(made.pipe, preset=preset)  # Raises if the model has no patch.
    from tomesd.pictures import comparison
    from tomesd.pictures.files import destination, save_image

    # ToMe cannot merge more than its partition's largest ratio.
    ratios = [ratio for ratio in comparison.RATIOS if ratio <= merging.largest_ratio]
    made.pipe.set_progress_bar_config(leave=False)
    cells = comparison.compare(
        made.pipe, given["prompt"], given["seed"], made.sampling, ratios, preset
    )
    seconds = {f"seconds_{m}": [round(cell.seconds, 3) for cell in row] for m, row in cells.items()}
    written = {
        **made.metadata,
        "prompt": given["prompt"],
        "seed": given["seed"],
        "preset": preset,
        "size": job.size(cells["tome"][0].image),
        "ratios": ratios,
        **seconds,
    }
    caption = (
        "{model}, {size} px, seed {seed}, {steps} steps of {scheduler}, guidance {guidance}, "
        "preset {preset}, {precision} on {device}"
    ).format(**written)
    path = destination(given["output"])
    save_image(comparison.picture(cells, ratios, given["prompt"], caption), path, written)
    click.echo(f"{path}: ratios {ratios}")
    for name, row in seconds.items():
        click.echo(f"{name}: {row}")
