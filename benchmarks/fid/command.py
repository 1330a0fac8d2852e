"""Token merging against random pruning in quality, speed and memory: python scripts/fid.py

Every row of the table (unpatched, and each method at each ratio) gets a picture of the same prompts
and seeds. Then: Fréchet distance, kernel distance, precision and recall against a reference set;
how much pictures differ from the unpatched ones; seconds and memory for a picture; and, on a GPU or
with --memory-limit, the largest batch and picture that fit. That is ToMe's Table 15 with its
Figures 11 and 12.

By default all of it is the embedded Shapes world, and the distance is taken on the features of its
classifier, so it is no FID. --preset paper is the paper's setting and needs --reference, a folder
of ImageNet's validation images with a folder for each class.

The same command goes on where it was stopped. For several GPUs: accelerate launch scripts/fid.py.
"""

import argparse
import json
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from benchmarks.common.arguments import number, run_script, script_parser, size
from benchmarks.common.device import PRECISIONS, choose_device, choose_precision
from benchmarks.common.files import check_folder, save_image, versions, atomic_write
from benchmarks.fid import fid, report
from benchmarks.fid.distances import Features
from benchmarks.fid.memory_limits import check_limit
from benchmarks.pictures.reference import drawn, from_folder
from benchmarks.pictures.picture_set import Model, Run, rows
from benchmarks.pictures.sampling import SCHEDULERS, check_model, choose, native_side
from benchmarks.quality.cases import run_folder
from tomesd.diffusion.settings import PRESETS


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    fill_in(args)
    transformers.utils.logging.disable_progress_bar()
    try:
        state = start(args)
        plan, pipe = prepare(args, state)
    except (ValueError, TypeError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    try:
        distance = fid.make_pictures(plan, pipe, state)
        if state.is_main_process:
            results = fid.measure(plan, pipe, distance)
            given = sys.argv[1:] if argv is None else argv
            results["command"] = shlex.join(["python", "scripts/fid.py", *given])
            write(plan, results)
    except (FloatingPointError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}\nWhat is done stays; the same command goes on.")


def fill_in(args: argparse.Namespace) -> None:
    """What was not given is the preset's, or else the default."""
    defaults: dict[str, Any] = {"methods": fid.METHODS} | fid.PRESETS.get(args.preset, {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    is_embedded = args.model is None
    args.prompts = args.prompts or ("shapes" if is_embedded else None)
    args.reference = args.reference or ("shapes" if is_embedded else None)
    args.features = args.features or ("shapes" if args.reference == "shapes" else "inception")


def start(args: argparse.Namespace) -> PartialState:
    """This process's place among others; each takes its own device. They wait for one another."""
    device = choose_device(args.device)
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))
    args.device = state.device if state.num_processes > 1 else device
    return state


def prepare(args: argparse.Namespace, state: PartialState) -> tuple[fid.Plan, Any]:
    """Everything checked and the pipeline loaded; raises what is wrong, the quick checks first."""
    for name in ("prompts", "reference"):
        if getattr(args, name) is None:
            raise ValueError(f"{name} must be given for a model other than the embedded one")
    check_folder(args.output)
    compared = rows(args.methods, args.patch_preset)
    prompts = fid.prompts(args.prompts, args.num_images)
    if args.reference == "shapes":
        reference = drawn(args.num_reference or 5000)
    else:
        reference = from_folder(Path(args.reference), args.num_reference)
    check_model(args.model)
    finds_limits, limit = wants_limits(args)
    features = chosen_features(args)
    features.check()

    precision = args.precision or choose_precision(args.device)
    model = Model(args.model, str(args.device), PRECISIONS[precision], args.scheduler)
    pipe = model.load()
    with compared[-1].patched(pipe):  # raises if it cannot be
        pass
    pixels = args.size or (native_side(pipe), native_side(pipe))
    how = choose(pipe, args.model, args.steps, args.guidance, pixels)
    told = fid.identity(model, precision, prompts, how, args.batch, args.patch_preset)
    run = Run(run_folder(args.output, told), compared, prompts, how, args.batch)
    settings = told | {
        "model": args.model or "embedded",
        "weights": told["model"],
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": args.prompts,
        "reference": reference.name,
        "features": args.features,
    }
    rounds = 0 if args.quality_only else args.rounds
    plan = fid.Plan(run, model, reference, features, settings, rounds, finds_limits, limit)
    return plan, pipe


def wants_limits(args: argparse.Namespace) -> tuple[bool, int | None]:
    """Whether limits are looked for, and the bytes that a process may take."""
    limit = None if args.memory_limit is None else round(args.memory_limit * 1e9)
    wanted = args.device.type == "cuda" or limit is not None
    if args.quality_only or args.no_limits or not wanted:
        return False, None
    check_limit(args.device, limit)
    return True, limit


def chosen_features(args: argparse.Namespace) -> Features:
    weights = {"inception": args.inception_weights, "shapes": args.classifier}
    for name, path in weights.items():
        if path is not None and name != args.features:
            raise ValueError(f"features must be {name} for {path}, got {args.features}")
    return Features(args.features, weights[args.features])


def write(plan: fid.Plan, results: dict[str, Any]) -> None:
    """results.json, table.md, the plot and the sheets, each written whole."""
    folder = plan.run.folder
    written = {"results.json": json.dumps(results, indent=1) + "\n"}
    table = report.table(results["rows"], plan.features, len(plan.run.prompts))
    written["table.md"] = f"{table}\n\n{report.about(results)}\n"
    for name, text in written.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    if plan.rounds:
        with atomic_write(folder / "plot.png") as partial:
            report.plot(results["rows"], plan.features.distance, partial)
    versions_used = versions("tomesd", "torch", "diffusers")
    save_image(report.figure_11(plan.run), folder / "methods.png", versions_used)
    save_image(report.figure_12(plan.run), folder / "samples.png", versions_used)
    print(f"{table}\n\n{folder}: table.md, results.json, the plot, two sheets and all pictures")


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=sorted(fid.PRESETS), help="paper: ToMe, Appendix F; quick: 64 images")
    add("--methods", nargs="+", metavar="METHOD:RATIOS", help=f"({' '.join(fid.METHODS)})")
    add("--patch-preset", choices=sorted(PRESETS), help="how both methods merge (the defaults)")
    add("--num-images", type=number(int, 1, 1_000_000), help="in each row (1000, or the prompts)")
    add("--model", help="hub id or folder (the embedded pipeline, 128x128 px)")
    add("--prompts", help="shapes, imagenet or a file with one in each line (shapes)")
    add("--reference", help="shapes or a folder of pictures, or of classes' folders (shapes)")
    add("--num-reference", type=number(int, 1, 10_000_000), help="(shapes: 5000, a folder: all)")
    add("--features", choices=("shapes", "inception"), help="(shapes where the reference is)")
    add("--inception-weights", type=Path, help="torch-fidelity's InceptionV3 file (downloaded)")
    add("--classifier", type=Path, help="folder of a ViT of the Shapes world (the embedded one)")
    add("--scheduler", choices=SCHEDULERS, help="(the pipeline's own)")
    add("--steps", type=number(int, 1, 1000), help="(embedded: 25, others: their own)")
    add("--guidance", type=number(float, 0, 100), help="(embedded: 4, others: their own)")
    add("--size", type=size, help="pixels, one side or WxH (what the model was made for)")
    add("--batch", type=number(int, 1, 1024), default=8, help="pictures sampled at once (8)")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add("--rounds", type=number(int, 1, 1000), default=3, help="batches timed in each row (3)")
    add("--memory-limit", type=number(float, 0.1, 10_000), help="GB, to find limits in (a GPU's)")
    add("--no-limits", action="store_true", help="do not look for the largest batch and picture")
    add("--quality-only", action="store_true", help="no times, memory or limits")
    add("--output", type=Path, default=Path("runs/fid"), help="folder (%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, goes_on=True)
