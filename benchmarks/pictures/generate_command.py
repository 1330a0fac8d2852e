"""The command of scripts/generate.py: pictures with merged tokens, or a comparison of methods."""

import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import tomesd
from benchmarks.common.arguments import Command, number, size
from benchmarks.common.device import PRECISIONS, choose_device, choose_precision
from benchmarks.common.files import check_output, destination, save_image, versions
from benchmarks.pictures import comparison, sampling
from benchmarks.pictures.sampling import Sampling
from tomesd.diffusion.settings import METHODS, PRESETS, DiffusionSettings, diffusion_settings


@dataclass(frozen=True)
class Job:
    """What to make: the arguments, the patched pipeline, and how it merges and samples."""

    args: Namespace
    pipe: Any
    merging: DiffusionSettings
    sampling: Sampling


def prepare(args: Namespace) -> Job:
    """Check the arguments, then load and patch the pipeline."""
    merging = check(args)
    dtype = PRECISIONS[args.precision]
    pipe = sampling.load_pipeline(args.model, args.device, dtype, args.scheduler)
    chosen = sampling.choose(pipe, args.model, args.steps, args.guidance, args.size)
    tomesd.apply_patch(pipe, **asdict(merging))
    return Job(args, pipe, merging, chosen)


def run(job: Job) -> None:
    (compare if job.args.compare else generate)(job)


def generate(job: Job) -> None:
    """Make each picture and print its file and time."""
    args = job.args
    seeds = [args.seed + index for index in range(args.num_images)]
    start = time.perf_counter()
    images = sampling.sample(job.pipe, [args.prompt] * len(seeds), seeds, job.sampling)
    for index, image in enumerate(images):
        seconds = time.perf_counter() - start
        extra = {
            "seed": seeds[index],
            "ratio": job.merging.ratio,
            "method": job.merging.method,
            "merging": json.dumps(asdict(job.merging)),
            "seconds": f"{seconds:.3f}",
        }
        path = destination(args.output, index, len(seeds))
        save_image(image, path, metadata(job, image) | extra)
        print(f"{path}: {seconds:.2f} s")
        start = time.perf_counter()
    if args.report:
        print(tomesd.report(job.pipe))


def compare(job: Job) -> None:
    """Make one picture of many: a row for each method, a column for each ratio."""
    args = job.args
    # ToMe cannot merge more than its partition's largest ratio.
    ratios = [ratio for ratio in comparison.RATIOS if ratio <= job.merging.largest_ratio]
    job.pipe.set_progress_bar_config(leave=False)
    cells = comparison.compare(job.pipe, args.prompt, args.seed, job.sampling, ratios, args.preset)
    seconds = {f"seconds_{m}": [round(cell.seconds, 3) for cell in row] for m, row in cells.items()}
    written = metadata(job, cells["tome"][0].image) | {"ratios": ratios} | seconds
    caption = (
        "{model}, {size} px, seed {seed}, {steps} steps of {scheduler}, guidance {guidance}, "
        "preset {preset}, {precision} on {device}"
    ).format(**written)
    path = destination(args.output)
    save_image(comparison.picture(cells, ratios, args.prompt, caption), path, written)
    print(f"{path}: ratios {ratios}", *(f"{k}: {v}" for k, v in seconds.items()), sep="\n")


def metadata(job: Job, image: Image.Image) -> dict[str, Any]:
    """The settings that every picture's file has."""
    args = job.args
    return {
        "prompt": args.prompt,
        "model": args.model or "embedded",
        "seed": args.seed,
        "steps": job.sampling.steps,
        "guidance": job.sampling.guidance,
        "size": f"{image.width}x{image.height}",
        "scheduler": type(job.pipe.scheduler).__name__,
        "preset": args.preset or "none",
        "device": str(args.device),
        "precision": args.precision,
        **versions("tomesd", "torch", "diffusers"),
    }


def check(args: Namespace) -> DiffusionSettings:
    """Set defaults, and raise for what is known to be wrong before loading."""
    if args.compare:
        for name in ("ratio", "method", "num_images", "report"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is not allowed with --compare")
    args.num_images = args.num_images or 1
    ratio = 0.5 if args.ratio is None else args.ratio
    merging = diffusion_settings(ratio, args.preset, {"method": args.method or "tome"})
    args.device = choose_device(args.device)
    args.precision = args.precision or choose_precision(args.device)
    check_output(args.output)
    sampling.check_model(args.model)
    return merging


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt")
    add("--ratio", type=float, help="share of the tokens to merge; 0 changes nothing (0.5)")
    add("--method", choices=METHODS, help="merge similar tokens or drop random ones (tome)")
    add("--preset", choices=sorted(PRESETS), help="paper: all branches and levels, as Appendix F")
    add("--compare", action="store_true", help="both methods at ratios 0 to 0.6 in one picture")
    add("--model", help="hub id or folder (the embedded pipeline, 128x128 px)")
    add("--scheduler", choices=sampling.SCHEDULERS, help="(the pipeline's own)")
    add("--steps", type=number(int, 1, 1000), help="(embedded: 25, others: their own)")
    add("--guidance", type=number(float, 0, 100), help="(embedded: 4, others: their own)")
    add("--size", type=size, help="pixels, one side or WxH (the model's own)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of the first picture (0)")
    add("--num-images", type=number(int, 1, 100_000), help="with seed, seed + 1, and so on (1)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add(
        "--output",
        type=Path,
        default=Path("runs/generate"),
        help="PNG file or folder (%(default)s)",
    )
    add("--report", action="store_true", default=None, help="print where how many tokens merged")


main = Command("generate", add_options, prepare, run)
