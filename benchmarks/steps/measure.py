"""Pictures of each recipe, and how far they are from those of the whole model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

import tomesd
from benchmarks.caches.known import known_caches
from benchmarks.caches.work import counted
from benchmarks.common.files import read_json, write_json
from benchmarks.pictures.differences import ssim
from benchmarks.quality.cases import correct
from benchmarks.steps.recipes import RatioForWork, Recipe, recipes
from tomesd.pictures.differences import psnr
from tomesd.pictures.files import atomic_write
from tomesd.pictures.sampling import Sampling, sample
from tomesd.shapes.world import Scene

WHOLE = "whole"
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75)


def ratio_for_work(pipe: Any, denoiser: Any, sampling: Sampling) -> RatioForWork:
    """Measured in two steps at each of a few ratios: PixArt's pipeline cannot take a single one.

    >>> ratio_for = ratio_for_work(pipe, pipe.unet, Sampling(1, 4.0))
    """

    def work(ratio: float) -> int:
        two = Sampling(2, sampling.guidance)
        with tomesd.patched(pipe, ratio=ratio, max_downsample=8), counted(denoiser) as done:
            list(sample(pipe, ["a red heart"], [0], two))
        return done.flops

    whole = work(0.0)
    return RatioForWork({ratio: work(ratio) / whole for ratio in _RATIOS})


class Table:
    """The rows that a run has measured so far, in a file.

    >>> table = Table(Path("runs/steps/results.json"), {"model": "unet"})

    depends_on: what all rows depend on. Raises ValueError if the file has rows of others.
    """

    def __init__(self, file: Path, depends_on: dict[str, Any]):
        self.file = file
        self.record = read_json(file) or {"depends_on": depends_on, "rows": []}
        if self.record["depends_on"] != depends_on:
            raise ValueError(
                f"output must be another folder: {file} is of {self.record['depends_on']}, not of "
                f"{depends_on}"
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.record["rows"]

    def has(self, **key: Any) -> bool:
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_json(self.file, self.record)


class Measurement:
    """The pictures of one model with one set of seeds.

    >>> Measurement(pipe, denoiser, scenes, seeds, guidance=4.0, batch=8)

    scenes: one for each seed.
    """

    def __init__(
        self,
        pipe: Any,
        denoiser: Any,
        scenes: Sequence[Scene],
        seeds: Sequence[int],
        guidance: float,
        batch: int,
    ):
        self.pipe, self.denoiser = pipe, denoiser
        self.scenes, self.seeds = scenes, seeds
        self.guidance, self.batch = guidance, batch

    def pictures(self, steps: int, recipe: Recipe) -> tuple[list[Image.Image], int]:
        """The pictures and the blocks' work on them."""
        prompts = [scene.prompt for scene in self.scenes]
        sampling = Sampling(steps, self.guidance)
        with recipe.applied(self.pipe, self.denoiser), counted(self.denoiser) as work:
            images = list(sample(self.pipe, prompts, self.seeds, sampling, self.batch))
        return images, work.flops

    def whole(self, steps: int, file: Path) -> tuple[list[Image.Image], int]:
        """The same of the model as it is, kept in a file."""
        if not file.exists():
            images, work = self.pictures(steps, Recipe(WHOLE))
            with atomic_write(file) as partial:
                pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
                torch.save({"pixels": pixels, "work": work}, partial)
        kept = torch.load(file)
        return [Image.fromarray(each) for each in kept["pixels"].numpy()], kept["work"]

    def row(
        self, images: list[Image.Image], work: float, whole: list[Image.Image]
    ) -> dict[str, Any]:
        """What is measured of pictures, each beside that of the whole model."""
        ratios = [value for value in map(psnr, images, whole) if np.isfinite(value)]
        return {
            "work": work,
            "psnr": fmean(ratios) if ratios else None,
            "ssim": fmean(map(ssim, images, whole)),
            "right": sum(correct(images, self.scenes)),
        }


def measure(
    table: Table, measurement: Measurement, steps: int, ratio_for: RatioForWork, **key: Any
) -> None:
    """Add the rows of all recipes at one number of steps that are missing.

    >>> measure(table, measurement, 25, ratio_for, model="unet", seed=0)
    """
    key = key | {"steps": steps}
    name = "-".join(str(value) for value in key.values())
    images, total = measurement.whole(steps, table.file.parent / f"{name}.pt")
    if not table.has(**key, recipe=WHOLE):
        table.add(key | {"recipe": WHOLE} | measurement.row(images, 1.0, images))
    for recipe in recipes(steps, ratio_for, known_caches(measurement.denoiser)):
        if not table.has(**key, recipe=recipe.name):
            made, work = measurement.pictures(steps, recipe)
            row = measurement.row(made, work / total, images)
            table.add(key | {"recipe": recipe.name, "ratio": _ratio(recipe)} | row)


def _ratio(recipe: Recipe) -> float | None:
    ratio: Any = recipe.merging and recipe.merging["ratio"]
    return (
        max(each for _, each in ratio.pieces) if isinstance(ratio, tomesd.RatioSchedule) else ratio
    )
