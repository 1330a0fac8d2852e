"""The same picture with each method at each ratio, and its time (ToMe, Figure 11)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

import tomesd
from tomesd.pictures.grid import grid
from tomesd.pictures.sampling import Sampling, sample

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
NAMES = {"tome": "ToMe", "prune": "pruning"}


class Cell(NamedTuple):
    """One picture and its time in seconds, from the prompt to the pixels."""

    image: Image.Image
    seconds: float


def compare(
    pipe: Any,
    prompt: str,
    seed: int,
    sampling: Sampling,
    ratios: Sequence[float] = RATIOS,
    preset: str | None = None,
) -> dict[str, list[Cell]]:
    """A row of cells, one for each ratio, for ToMe ("tome") and for random pruning ("prune").

    >>> cells = compare(pipe, "a photo of a red heart", 0, Sampling(25, 4.0))

    ratios: start with 0; the unpatched picture is made once and shown in both rows.
    Each cell is one run after a short warm-up, ToMe and pruning interleaved: enough to see a large
    effect, but not a few percent, for which there is `scripts/benchmark.py`.
    Raises ValueError if ratios do not start with 0, and as apply_patch does; the patch is removed.
    """
    if not ratios or ratios[0] != 0:
        raise ValueError(f"ratios must start with 0, got {list(ratios)}")

    def run(method: str, ratio: float, how: Sampling) -> Cell:
        with tomesd.patched(pipe, ratio, preset=preset, method=method):
            start = perf_counter()
            (image,) = sample(pipe, [prompt], [seed], how)
            return Cell(image, perf_counter() - start)

    runs = [("tome", ratios[0]), *((method, ratio) for ratio in ratios[1:] for method in NAMES)]
    # Warm up: first calls allocate memory and load kernels.
    for method, ratio in runs[:3]:
        run(method, ratio, replace(sampling, steps=min(2, sampling.steps)))
    done = {
        (method, ratio): run(method, ratio, sampling)
        for method, ratio in tqdm(runs, desc="pictures")
    }
    return {
        method: [done["tome" if ratio == 0 else method, ratio] for ratio in ratios]
        for method in NAMES
    }


def picture(
    cells: Mapping[str, Sequence[Cell]], ratios: Sequence[float], title: str, caption: str
) -> Image.Image:
    """The cells of `compare` as one picture, each with its time below.

    >>> picture(cells, RATIOS, "a photo of a red heart", "embedded, 25 steps")
    """
    return grid(
        [[cell.image for cell in row] for row in cells.values()],
        rows=[NAMES[method] for method in cells],
        columns=[f"ratio {ratio:g}" if ratio else "unpatched" for ratio in ratios],
        labels=[[f"{cell.seconds:.2f} s" for cell in row] for row in cells.values()],
        title=title,
        caption=f"{caption}; seconds per picture, one run each",
    )
