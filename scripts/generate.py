"""Make pictures with merged tokens: python scripts/generate.py "a photo of a red heart" --ratio 0.5

Uses the embedded pipeline of the Shapes world or, with --model, any Stable Diffusion. --compare
makes one picture of many: a row for ToMe and a row for random pruning, each cell with its time.
Pictures are PNG files that carry their settings; they are written whole or not at all.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomesd
from tomesd.evaluation import comparison, sampling
from tomesd.evaluation.arguments import number, size
from tomesd.evaluation.device import PRECISIONS, choose_device, choose_precision
from tomesd.evaluation.image_file import check_output, destination, save_image, versions
from tomesd.settings import METHODS, PRESETS, DiffusionSettings, diffusion_settings


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        merging = check(args)
        precision = PRECISIONS[args.precision]
        pipe = sampling.load_pipeline(args.model, args.device, precision, args.scheduler)
        how = sampling.choose(pipe, args.model, args.steps, args.guidance, args.size)
        # Only now it is known whether the model can be patched.
        with tomesd.patched(pipe, **asdict(merging)):
            pass
    except (ValueError, TypeError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    try:
        (compare if args.compare else generate)(pipe, args, merging, how)
    except KeyboardInterrupt:
        sys.exit("stopped: no file is left half-written")


def generate(pipe: Any, args: argparse.Namespace, merging: DiffusionSettings, how) -> None:
    seeds = [args.seed + index for index in range(args.num_images)]
    with tomesd.patched(pipe, **asdict(merging)):
        start = time.perf_counter()
        for index, image in enumerate(
            sampling.sample(pipe, [args.prompt] * len(seeds), seeds, how)
        ):
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


def compare(pipe: Any, args: argparse.Namespace, merging: DiffusionSettings, how) -> None:
    # Above its partition's largest ratio ToMe has nothing to show.
    ratios = [ratio for ratio in comparison.RATIOS if ratio <= merging.largest_ratio]
    pipe.set_progress_bar_config(leave=False)
    cells = comparison.compare(pipe, args.prompt, args.seed, how, ratios, args.preset)
    about = metadata(pipe, args, how, cells["tome"][0].image) | {"ratios": json.dumps(ratios)}
    for method, row in cells.items():
        about[f"seconds_{method}"] = json.dumps([round(cell.seconds, 3) for cell in row])
    caption = (
        "{model}, {size} px, seed {seed}, {steps} steps of {scheduler}, guidance {guidance}, "
        "preset {preset}, {precision} on {device}"
    ).format(**about)
    picture = comparison.comparison_picture(cells, ratios, args.prompt, caption)
    path = destination(args.output)
    save_image(picture, path, about)
    for method, row in cells.items():
        times = ", ".join(f"{cell.seconds:.2f}" for cell in row)
        print(
            f"{comparison.NAMES[method]}, seconds at ratio {ratios[0]:g} to {ratios[-1]}: {times}"
        )
    print(path)


def metadata(pipe: Any, args: argparse.Namespace, how, image) -> dict[str, Any]:
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
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
    add("--report", action="store_true", default=None, help="print which tokens merged where")
    return parser


if __name__ == "__main__":
    main()
