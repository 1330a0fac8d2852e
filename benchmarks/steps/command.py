"""The command of scripts/steps.py: options, checks, and the order of the work."""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder, digest, write_text
from benchmarks.pictures.prompts import held_out
from benchmarks.steps import table_and_plot
from benchmarks.steps.measure import Measurement, Table, blocks_for_work, measure, ratio_for_work
from tomesd.pictures import classifiers
from tomesd.pictures.device import choose_device, device_name
from tomesd.pictures.files import atomic_write, versions
from tomesd.pictures.sampling import (
    check_model,
    choose,
    embedded_folder,
    load_pipeline,
)
from tomesd.shapes.world import Scene

# The most telling first.
STEPS = (25, 4, 8, 15, 2, 50, 1)
# A solver that is good at few steps as well; a distilled model needs its own.
_SCHEDULERS = {"unet": "dpm++", "few-step": None, "transformer": "dpm++"}
# A distilled model is made for few steps. PixArt's pipeline takes another way for a single step,
# which this scheduler cannot go.
_FEWEST_AND_MOST = {"unet": (1, math.inf), "few-step": (1, 8), "transformer": (2, math.inf)}


@dataclass(frozen=True)
class Job:
    """The arguments, the table to fill, and the scenes of each seed's pictures."""

    args: Namespace
    table: Table
    scenes: list[Scene]


def prepare(args: Namespace) -> Job:
    """Check the arguments before any work."""
    check_folder(args.output)
    classifiers.check_model(None)
    args.device = choose_device(args.device)
    weights = {}
    for model in args.models:
        check_model(_hub_name(model))
        weights[model] = digest(embedded_folder(_hub_name(model)))
    depends_on = {
        "images": args.num_images,
        "batch": args.batch,
        "guidance": args.guidance,
        "device": args.device.type,
        "device_name": device_name(args.device),
        "threads": torch.get_num_threads(),
        **versions("tomesd", "torch", "diffusers"),
    }
    table = Table(args.output / "results.json", depends_on)
    table.record["weights"] = table.record.get("weights", {}) | weights
    table.record["command"] = args.command
    return Job(args, table, held_out(args.num_images))


def _hub_name(model: str) -> str | None:
    return None if model == "unet" else model


def run(job: Job) -> None:
    """Fill the table: all recipes at each number of steps, for each seed and model."""
    args = job.args
    todo = [
        (seed, steps, model)
        for seed in args.seeds
        for steps in args.steps
        for model in args.models
        if _FEWEST_AND_MOST[model][0] <= steps <= _FEWEST_AND_MOST[model][1]
    ]
    loaded: dict[str, Any] = {}
    for seed, steps, model in tqdm(todo, desc="steps"):
        if model not in loaded:
            pipe = load_pipeline(_hub_name(model), args.device, scheduler=_SCHEDULERS[model])
            pipe.set_progress_bar_config(disable=True)
            denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            sampling = choose(pipe, _hub_name(model), guidance=args.guidance)
            blocks_for = None
            if args.by_block:
                prompts = [scene.prompt for scene in held_out(args.num_images + 2)[-2:]]
                one = replace(sampling, steps=steps)
                blocks_for = blocks_for_work(pipe, denoiser, one, prompts)
            loaded[model] = pipe, denoiser, ratio_for_work(pipe, denoiser, sampling), blocks_for
        pipe, denoiser, ratio_for, blocks_for = loaded[model]
        seeds = [seed * 1000 + index for index in range(args.num_images)]
        measurement = Measurement(pipe, denoiser, job.scenes, seeds, args.guidance, args.batch)
        measure(job.table, measurement, steps, ratio_for, blocks_for, model=model, seed=seed)
    if args.by_block:
        print(f"{table_and_plot.by_block(job.table.rows)}\n\n{args.output}")
        return
    text = table_and_plot.table(job.table.rows)
    write_text(args.output / "table.md", f"{text}\n")
    with atomic_write(args.output / "steps.png") as file:
        table_and_plot.plot(job.table.rows, file)
    print(f"{text}\n\n{args.output}")


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    names = tuple(_SCHEDULERS)
    add("--models", nargs="+", choices=names, default=list(names), help="(all)")
    add("--steps", nargs="+", type=number(int, 1, 1000), default=list(STEPS), help=f"({STEPS})")
    add("--seeds", nargs="+", type=number(int, 0, 1000), default=[0, 1, 2], help="(0 1 2)")
    add("--num-images", type=number(int, 1, 1000), default=8, help="for each seed (%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=4.0, help="(%(default)s)")
    add("--batch", type=number(int, 1, 1024), default=8, help="images sampled at once (8)")
    add("--by-block", action="store_true", help="ratios of tomesd.calibrate beside one for all")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--output", type=Path, default=Path("runs/steps"), help="folder (%(default)s)")


main = Command("steps", add_options, prepare, run, resumes=True)
