"""The work of `tomesd generate`."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageOps

import tomesd
from tomesd.cli import job
from tomesd.cli.job import Job
from tomesd.diffusion.ratio_schedule import RatioSchedule
from tomesd.diffusion.settings import DiffusionSettings, diffusion_settings
from tomesd.pictures import sampling, token_pages
from tomesd.pictures.files import destination, open_image, save_image
from tomesd.pictures.prompts import read_prompts
from tomesd.targets import default_preset


@dataclass(frozen=True)
class Images:
    """Images to make: of each prompt and seed one; more: further arguments of the pipeline."""

    given: Mapping[str, Any]
    job: Job
    merging: DiffusionSettings
    prompts: list[str]
    seeds: list[int]
    more: dict[str, Any]

    def make(self) -> None:
        """Make them one by one, print the file and the time of each."""
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for index, (prompt, seed) in enumerate(pairs):
            if len(pairs) > 1:
                self.job.pipe.set_progress_bar_config(desc=f"{index + 1} of {len(pairs)}")
            traced: list[tomesd.TokenGroups] = []
            start = time.perf_counter()
            with ExitStack() as stack:
                if self.given["save_map"]:
                    traced = stack.enter_context(tomesd.trace(self.job.pipe))
                how = self.job.sampling
                (image,) = sampling.sample(self.job.pipe, [prompt], [seed], how, **self.more)
            seconds = time.perf_counter() - start
            path = destination(self.given["output"], index, len(pairs))
            save_image(image, path, self._metadata(image, prompt, seed, seconds))
            click.echo(f"{path}: {seconds:.2f} s")
            if self.given["save_map"]:
                steps = f"{how.steps} steps"
                caption = f"ratio {self.given['ratio']:g}, {steps}, seed {seed}"
                beside = path.with_stem(f"{path.stem}-map")
                page = token_pages.denoiser_page(image, traced, prompt, caption)
                save_image(page, beside, self._metadata(image, prompt, seed, seconds))
                click.echo(f"{beside}")
        if self.given["report"]:
            click.echo(str(tomesd.report(self.job.pipe)))

    def _metadata(
        self, image: Image.Image, prompt: str, seed: int, seconds: float
    ) -> dict[str, Any]:
        given = self.given
        started = {"img2img": given["img2img"], "strength": self.more.get("strength")}
        return {
            **self.job.metadata,
            "prompt": prompt,
            "seed": seed,
            "size": job.size(image),
            "preset": given["preset"] or "steady",
            "ratio": given["ratio"],
            "since": given["since"] or 0,
            "method": self.merging.method,
            "merging": job.as_text(self.merging),
            "seconds": f"{seconds:.3f}",
            **(started if given["img2img"] else {}),
        }


def prepare(given: dict[str, Any]) -> Images:
    """Check the options, then load and patch the pipeline.

    Raises ValueError, TypeError or OSError for options that are wrong.
    """
    prompts = _prompts(given)
    _merging(given)  # Raises for options that are wrong.
    if given["strength"] and not given["img2img"]:
        raise ValueError(f"strength is allowed with --img2img only, got {given['strength']}")
    if given["save_map"] and (given["ratio"] == 0 or given["compiles"]):
        raise ValueError(
            "save-map needs a ratio above 0 and a model that is not compiled, got "
            f"{'--compile' if given['compiles'] else '--ratio 0'}"
        )
    start = open_image(given["img2img"]) if given["img2img"] else None
    made = job.load(given, from_image=start is not None)
    more: dict[str, Any] = {}
    if start is not None:
        side = sampling.native_side(made.pipe) if given["size"] is None else 0
        image = ImageOps.fit(start, given["size"] or (side, side))
        more = {"image": image, "strength": given["strength"] or 0.8}
    if not (given["preset"] or given["since"] or given["levels"]):
        given = given | {"preset": default_preset(made.pipe)}
    merging = _merging(given)
    options = {field.name: getattr(merging, field.name) for field in fields(merging)}
    tomesd.apply_patch(made.pipe, **options)
    if given["compiles"]:
        denoiser = getattr(made.pipe, "unet", None) or made.pipe.transformer
        denoiser.compile(fullgraph=True)
    seeds = [given["seed"] + index for index in range(given["num_images"])]
    return Images(given, made, merging, prompts, seeds, more)


def _prompts(given: dict[str, Any]) -> list[str]:
    file: Path | None = given["prompts"]
    if (given["prompt"] is None) == (file is None):
        got = "neither" if file is None else "both"
        raise ValueError(f"PROMPT or --prompts FILE must be given, got {got}")
    return [given["prompt"]] if file is None else read_prompts(file)


def _merging(given: dict[str, Any]) -> DiffusionSettings:
    ratio = given["ratio"]
    if given["since"]:
        ratio = RatioSchedule.last(ratio, since=given["since"])
    more = {"max_downsample": int(given["levels"])} if given["levels"] else {}
    return diffusion_settings(ratio, given["preset"], {"method": given["method"], **more})
