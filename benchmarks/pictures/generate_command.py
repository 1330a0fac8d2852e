"""Make pictures with merged tokens: python scripts/generate.py "a photo of a red heart" --ratio 0.5

Uses the embedded pipeline of the Shapes world or, with --model, any Stable Diffusion. --compare
makes one picture of many: a row for ToMe and a row for random pruning, each cell with its time.
Pictures are PNG files that carry their settings. Times are from the prompt to the pixels; the first
picture's includes the warm-up, except with --compare.

--output is a PNG file, which replaces one that is there and is numbered if there are several
pictures; or a folder, where each picture takes the next free name (00001.png).
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomesd
from benchmarks.common.arguments import number, run_script, script_parser, size
from benchmarks.common.device import PRECISIONS, choose_device, choose_precision
from benchmarks.common.files import check_output, destination, save_image, versions
from benchmarks.pictures import comparison, sampling
from benchmarks.pictures.sampling import Sampling
from tomesd.diffusion.settings import METHODS, PRESETS, DiffusionSettings, diffusion_settings


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        merging = check(args)
        dtype = PRECISIONS[args.precision]
        pipe = sampling.load_pipeline(args.model, args.device, dtype, args.scheduler)
        how = sampling.choose(pipe, args.model, args.steps, args.guidance, args.size)
        tomesd.apply_patch(pipe, **asdict(merging))
    except (ValueError, TypeError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    try:
        (compare if args.compare else generate)(pipe, args, merging, how)
    except (FloatingPointError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def generate(
    pipe: Any, args: argparse.Namespace, merging: DiffusionSettings, how: Sampling
) -> None:
    seeds = [args.seed + index for index in range(args.num_images)]
    start = time.perf_counter()
    for index, image in enumerate(sampling.sample(pipe, [args.prompt] * len(seeds), seeds, how)):
        seconds = time.perf_counter() - start
        about = metadata(pipe, args, how, image) | {
            "seed": seeds[index],
            "ratio": merging.ratio,
            "method": merging.method,
            "merging": json.dumps(asdict(merging)),
            "seconds": f"{seconds:.3f}",
        }
        path = destination(args.output, index, len(seeds))
        save_image(image, path, about)
        print(f"{path}: {seconds:.2f} s")
        start = time.perf_counter()
    if args.report:
        print(tomesd.report(pipe))


def compare(pipe: Any, args: argparse.Namespace, merging: DiffusionSettings, how: Sampling) -> None:
    # Above its partition's largest ratio ToMe has nothing to show.
    ratios = [ratio for ratio in comparison.RATIOS if ratio <= merging.largest_ratio]
    pipe.set_progress_bar_config(leave=False)
    cells = comparison.compare(pipe, args.prompt, args.seed, how, ratios, args.preset)
    seconds = {f"seconds_{m}": [round(cell.seconds, 3) for cell in row] for m, row in cells.items()}
    about = metadata(pipe, args, how, cells["tome"][0].image) | {"ratios": ratios} | seconds
    caption = (
        "{model}, {size} px, seed {seed}, {steps} steps of {scheduler}, guidance {guidance}, "
        "preset {preset}, {precision} on {device}"
    ).format(**about)
    path = destination(args.output)
    save_image(comparison.picture(cells, ratios, args.prompt, caption), path, about)
    print(f"{path}: ratios {ratios}", *(f"{k}: {v}" for k, v in seconds.items()), sep="\n")


def metadata(pipe: Any, args: argparse.Namespace, how: Sampling, image) -> dict[str, Any]:
    return {
        "prompt": args.prompt,
        "model": args.model or "embedded",
        "seed": args.seed,
        "steps": how.steps,
        "guidance": how.guidance,
        "size": f"{image.width}x{image.height}",
        "scheduler": type(pipe.scheduler).__name__,
        "preset": args.preset or "none",
        "device": str(args.device),
        "precision": args.precision,
        **versions("tomesd", "torch", "diffusers"),
    }


def check(args: argparse.Namespace) -> DiffusionSettings:
    """Fill in what was left open, and raise what can be known to be wrong before loading."""
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


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("prompt")
    add("--ratio", type=float, help="share of the tokens to merge; 0 changes nothing (0.5)")
    add("--method", choices=METHODS, help="merge alike tokens or drop random ones (tome)")
    add("--preset", choices=sorted(PRESETS), help="paper: all branches and levels, as Appendix F")
    add("--compare", action="store_true", help="both methods at ratios 0 to 0.6 in one picture")
    add("--model", help="hub id or folder (the embedded pipeline, 128x128 px)")
    add("--scheduler", choices=sampling.SCHEDULERS, help="(the pipeline's own)")
    add("--steps", type=number(int, 1, 1000), help="(embedded: 25, others: their own)")
    add("--guidance", type=number(float, 0, 100), help="(embedded: 4, others: their own)")
    add("--size", type=size, help="pixels, one side or WxH (what the model was made for)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of the first picture (0)")
    add("--num-images", type=number(int, 1, 100_000), help="with seed, seed + 1, and so on (1)")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add(
        "--output",
        type=Path,
        default=Path("runs/generate"),
        help="PNG file or folder (%(default)s)",
    )
    add("--report", action="store_true", default=None, help="print where how many tokens merged")
    return parser


if __name__ == "__main__":
    run_script(main)
