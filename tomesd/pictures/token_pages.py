"""Pages of images with their merged tokens, by layer or by step (ToMe, Figures 4 and 6)."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from tomesd.pictures.grid import grid
from tomesd.tracing import TokenGroups
from tomesd.visualize import draw_groups

# A token of this many pixels has a border that is easy to see.
PIXELS_PER_TOKEN = 12


def layers_picture(
    image: Image.Image,
    traced: Sequence[TokenGroups],
    layers: Sequence[int],
    title: str = "",
    caption: str = "",
    sample: int = 0,
) -> Image.Image:
    """What a Vision Transformer saw, and what has become of its patches after some layers.

    >>> layers_picture(picture, traced, layers=[0, 5, 11])

    traced: one forward, from `tomesd.trace`. layers: counted from 0. sample: of the batch.
    Raises IndexError for a layer that there is not, and as `draw_groups` does.
    """
    cells, names, tokens = [image.convert("RGB")], ["input"], [f"{traced[0].patches[0].numel()}"]
    for layer in layers:
        patches = traced[layer].patches[sample]
        cells.append(draw_groups(image, patches))
        names.append(f"after {traced[layer].where}")
        tokens.append(f"{_count(patches)}")
    labels = [f"{count} tokens" for count in tokens]
    return grid([cells], [""], names, [labels], title, caption)


def steps_picture(
    image: Image.Image,
    traced: Sequence[TokenGroups],
    steps: Sequence[int],
    title: str = "",
    caption: str = "",
    sample: int = -1,
) -> Image.Image:
    """What merges in a denoiser: a row for each step, a column for each block.

    >>> steps_picture(picture, traced, steps=[5, 12, 24])

    image: the picture that was made; every cell shows the groups of its latents over it.
    traced: from `tomesd.trace`, of one denoiser. steps: counted from 0. sample: of the batch; the
        last is computed with the prompt where classifier-free guidance computes two.
    Raises ValueError for a step that was not traced, and as `draw_groups` does.
    """
    there = {record.step for record in traced}
    for step in steps:
        if step not in there:
            merged = f"{min(there)} to {max(there)}" if there else "none"
            raise ValueError(f"steps must be among those that merged, {merged}, got {step}")
    rows = [[record for record in traced if record.step == step] for step in steps]
    return grid(
        [[draw_groups(image, record.patches[sample]) for record in row] for row in rows],
        [f"step {step}" for step in steps],
        [_short(record.where) for record in rows[0]],
        [[f"{_count(record.patches[sample])} tokens" for record in row] for row in rows],
        title,
        caption,
    )


def denoiser_page(
    image: Image.Image, traced: Sequence[TokenGroups], title: str = "", caption: str = ""
) -> Image.Image:
    """`steps_picture` of the first, the middle and the last step that merge, enlarged as needed.

    >>> denoiser_page(picture, traced)

    Raises ValueError if nothing merged.
    """
    steps = sorted({record.step for record in traced})
    if not steps:
        raise ValueError("traced must have a step that merges, got none")
    finest = max((record.grid for record in traced), key=lambda grid: grid[0])
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    return steps_picture(enlarged(image, finest), traced, shown, title, caption)


def enlarged(image: Image.Image, grid: Sequence[int]) -> Image.Image:
    """The picture at a whole multiple of its size at which single tokens can be seen.

    >>> enlarged(picture, (28, 28)).size
    (336, 336)
    """
    times = max(1, -(-PIXELS_PER_TOKEN * grid[0] // image.height))
    return image.resize((image.width * times, image.height * times), Image.Resampling.LANCZOS)


def quarters(layers: int) -> list[int]:
    """The last layer of each quarter, counted from 0.

    >>> quarters(12)
    [2, 5, 8, 11]
    """
    return sorted({layers * i // 4 - 1 for i in (1, 2, 3, 4)} - {-1})


def _count(patches: Tensor) -> int:
    return int(patches[patches >= 0].unique().numel())


def _short(where: str) -> str:
    """A diffusers block's name, as far as it fits above a picture.

    >>> _short("up_blocks.2.attentions.1.transformer_blocks.0")
    'up 2.1.0'
    """
    side, *rest = where.replace("_blocks", "").replace("_block", "").split(".")
    return f"{side} {'.'.join(part for part in rest if part.isdecimal())}"
