"""The command of scripts/fid.py: options, checks, and the files that a run writes."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from benchmarks.common.arguments import Command, number, size
from benchmarks.common.files import check_folder, settings_folder, write_json, write_text
from benchmarks.fid import measurements, tables_and_sheets
from benchmarks.fid.distances import Features
from benchmarks.fid.memory_limits import check_limit
from benchmarks.fid.plan import METHODS, PRESETS, Plan
from benchmarks.pictures.picture_set import PictureSet, PipelineSpec, identity, parse_methods
from benchmarks.pictures.prompts import load_prompts
from benchmarks.pictures.reference import drawn, from_folder
from tomesd.diffusion.settings import PRESETS as PATCH_PRESETS
from tomesd.pictures.device import PRECISIONS, choose_device, choose_precision
from tomesd.pictures.files import atomic_write, save_image, versions
from tomesd.pictures.names import SCHEDULERS
from tomesd.pictures.sampling import check_model, choose, native_side


@dataclass(frozen=True)
class Job:
    """What to run: the plan, its pipeline, this process, and the command line."""

    plan: Plan
    pipe: Any
    state: PartialState
    command: str


def prepare(args: Namespace) -> Job:
    """Check the arguments, the quick checks first, and load the pipeline."""
    set_defaults(args)
    transformers.utils.logging.disable_progress_bar()
    state = start_process(args)
    for name in ("prompts", "reference"):
        if getattr(args, name) is None:
            raise ValueError(f"{name} must be given for a model other than the embedded one")
    check_folder(args.output)
    methods = parse_methods(args.methods, args.patch_preset)
    prompts = load_prompts(args.prompts, args.num_images)
    if args.reference == "shapes":
        reference = drawn(args.num_reference or 5000)
    else:
        reference = from_folder(Path(args.reference), args.num_reference)
    check_model(args.model)
    finds_limits, limit = wanted_limits(args)
    features = chosen_features(args)
    features.check()

    precision = args.precision or choose_precision(args.device)
    spec = PipelineSpec(args.model, str(args.device), PRECISIONS[precision], args.scheduler)
    pipe = spec.load()
    with methods[-1].patched(pipe):  # Raises if the model cannot be patched.
        pass
    pixels = args.size or (native_side(pipe), native_side(pipe))
    sampling = choose(pipe, args.model, args.steps, args.guidance, pixels)
    metadata = identity(spec, precision, prompts, sampling, args.batch, args.patch_preset)
    folder = settings_folder(args.output, metadata)
    pictures = PictureSet(folder, methods, prompts, sampling, args.batch)
    settings = metadata | {
        "model": args.model or "embedded",
        "weights": metadata["model"],
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": args.prompts,
        "reference": reference.name,
        "features": args.features,
    }
    rounds = 0 if args.quality_only else args.rounds
    plan = Plan(pictures, spec, reference, features, settings, rounds, finds_limits, limit)
    return Job(plan, pipe, state, args.command)


def run(job: Job) -> None:
    """Make the pictures; then the main process measures and writes."""
    distance = measurements.prepare_and_make_pictures(job.plan, job.pipe, job.state)
    if job.state.is_main_process:
        results = measurements.measure(job.plan, job.pipe, distance)
        write(job.plan, {"command": job.command} | results)


def set_defaults(args: Namespace) -> None:
    """Options that were not given are the preset's, or else the defaults."""
    defaults: dict[str, Any] = {"methods": METHODS} | PRESETS.get(args.preset, {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    is_embedded = args.model is None
    args.prompts = args.prompts or ("shapes" if is_embedded else None)
    args.reference = args.reference or ("shapes" if is_embedded else None)
    args.features = args.features or ("shapes" if args.reference == "shapes" else "inception")


def start_process(args: Namespace) -> PartialState:
    """This process among those of the run, each with a device of its own."""
    device = choose_device(args.device)
    # The timeout: processes wait for the slowest one.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))
    args.device = state.device if state.num_processes > 1 else device
    return state


def wanted_limits(args: Namespace) -> tuple[bool, int | None]:
    """Whether to find the limits, and the bytes that a process may take."""
    limit = None if args.memory_limit is None else round(args.memory_limit * 1e9)
    wanted = args.device.type == "cuda" or limit is not None
    if args.quality_only or args.no_limits or not wanted:
        return False, None
    check_limit(args.device, limit)
    return True, limit


def chosen_features(args: Namespace) -> Features:
    weights = {"inception": args.inception_weights, "shapes": args.classifier}
    for name, path in weights.items():
        if path is not None and name != args.features:
            raise ValueError(f"features must be {name} for {path}, got {args.features}")
    return Features(args.features, weights[args.features])


def write(plan: Plan, results: dict[str, Any]) -> None:
    """Write results.json, table.md, the plot and the sheets, each atomically."""
    pictures, features = plan.pictures, plan.features
    folder = pictures.folder
    table = tables_and_sheets.table(results["rows"], features)
    note = tables_and_sheets.few_pictures_note(len(pictures.prompts), features)
    if note:
        table = f"{table}\n\n{note}"
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", f"{table}\n\n{tables_and_sheets.settings_text(results)}\n")
    if plan.rounds:
        with atomic_write(folder / "plot.png") as partial:
            tables_and_sheets.plot(results["rows"], features.distance, partial)
    used = versions("tomesd", "torch", "diffusers")
    save_image(tables_and_sheets.methods_sheet(pictures), folder / "methods.png", used)
    save_image(tables_and_sheets.samples_sheet(pictures), folder / "samples.png", used)
    print(f"{table}\n\n{folder}: table.md, results.json, the plot, two sheets and all pictures")


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="paper: ToMe, Appendix F; quick: 64 images")
    add("--methods", nargs="+", metavar="METHOD:RATIOS", help=f"({' '.join(METHODS)})")
    add("--patch-preset", choices=sorted(PATCH_PRESETS), help="of both methods (the defaults)")
    add("--num-images", type=number(int, 1, 1_000_000), help="in each row (1000, or the prompts)")
    add("--model", help="hub id or folder (the embedded pipeline, 128x128 px)")
    add("--prompts", help="shapes, imagenet or a file with one prompt per line (shapes)")
    add("--reference", help="shapes, or a folder of images, or with one folder per class (shapes)")
    add("--num-reference", type=number(int, 1, 10_000_000), help="(shapes: 5000, a folder: all)")
    add("--features", choices=("shapes", "inception"), help="(shapes for a reference of shapes)")
    add("--inception-weights", type=Path, help="torch-fidelity's InceptionV3 file (downloaded)")
    add("--classifier", type=Path, help="folder of an embedded-style classifier (the embedded one)")
    add("--scheduler", choices=SCHEDULERS, help="(the pipeline's own)")
    add("--steps", type=number(int, 1, 1000), help="(embedded: 25, others: their own)")
    add("--guidance", type=number(float, 0, 100), help="(embedded: 4, others: their own)")
    add("--size", type=size, help="pixels, one side or WxH (the model's own)")
    add("--batch", type=number(int, 1, 1024), default=8, help="images sampled at once (8)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add("--rounds", type=number(int, 1, 1000), default=3, help="batches timed in each row (3)")
    add("--memory-limit", type=number(float, 0.1, 10_000), help="GB, for the limits (a GPU's)")
    add("--no-limits", action="store_true", help="do not find the largest batch and image")
    add("--quality-only", action="store_true", help="no times, memory or limits")
    add("--output", type=Path, default=Path("runs/fid"), help="folder (%(default)s)")


main = Command("fid", add_options, prepare, run, resumes=True)
