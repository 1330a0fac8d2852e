"""The command of scripts/frontier.py: options, checks, and the files that a run writes."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder, settings_folder, write_json, write_text
from benchmarks.frontier import plan as plans
from benchmarks.frontier import table_and_plot
from benchmarks.frontier.candidates import CANDIDATES, PEER, chosen
from benchmarks.frontier.plan import FEATURES, Plan
from benchmarks.frontier.quality import measure_quality
from benchmarks.frontier.results import joined_results, work_left
from benchmarks.frontier.speed import measure_speed
from benchmarks.models.unets import denoiser
from benchmarks.peer.process import PeerError, install_peer
from benchmarks.pictures.picture_set import PictureSet, PipelineSpec, identity
from benchmarks.pictures.prompts import load_prompts
from benchmarks.pictures.reference import drawn
from benchmarks.speed.setup import Setup
from tomesd.pictures.device import PRECISIONS, choose_device, choose_precision
from tomesd.pictures.files import atomic_write
from tomesd.pictures.sampling import EMBEDDED, Sampling, check_model
from tomesd.shapes.names import ASSETS


@dataclass(frozen=True)
class Job:
    """What to measure: the arguments and the plan."""

    args: Namespace
    plan: Plan


def prepare(args: Namespace) -> Job:
    """Check everything before any work."""
    transformers.utils.logging.disable_progress_bar()
    check_folder(args.output)
    candidates = chosen(args.only, with_peer=not args.no_peer)
    check_model(args.model)
    pipeline = Path(args.model) if args.model else ASSETS / "pipeline"
    if not pipeline.is_dir():
        raise FileNotFoundError(f"model must be a pipeline's folder, got {args.model!r}")
    prompts = load_prompts("shapes", args.num_images)
    reference = drawn(args.num_reference)
    FEATURES.check()
    small, large = setups(args, pipeline)
    for name, setup in (("size", small), ("speed-size", large)):
        pixels = setup.denoiser.pixels
        if setup.sizes[0] % pixels:
            raise ValueError(f"{name} must be a multiple of {pixels}, got {setup.sizes[0]}")
        work_left(setup, candidates)  # Raises for a model that cannot be patched.
    sampling = Sampling(args.steps, args.guidance, small.sizes[0], small.sizes[0])
    spec = PipelineSpec(args.model, str(small.device), small.dtype, None)
    metadata = identity(spec, small.precision, prompts, sampling, args.batch, None)
    # Each picture's file has its own merging, so that new candidates can join existing ones.
    del metadata["merging"]
    if not args.speed_only:
        quality = plans.quality_dependencies(metadata, small.device, reference.name)
        plans.check_same_dependencies(args.output / "quality.json", quality)
    if not args.quality_only:
        speed = plans.speed_dependencies(large)
        plans.check_same_dependencies(args.output / "speed.json", speed)
    if any(candidate.is_peer for candidate in candidates):
        peer = install_peer(PEER, args.peer_cache)
        small, large = (replace(each, peer=peer, peer_name=PEER) for each in (small, large))
    folder = settings_folder(args.output / "pictures", metadata)
    pictures = PictureSet(folder, [*candidates], prompts, sampling, args.batch)
    plan = Plan(
        args.output, candidates, pictures, spec, pipeline, reference, metadata, small, large
    )
    return Job(args, plan)


def setups(args: Namespace, pipeline: Path) -> tuple[Setup, Setup]:
    """The pipeline's own denoiser, and the one that is timed."""
    device = choose_device(args.device)
    large = Setup(
        denoiser=denoiser(args.speed_model),
        sizes=[args.speed_size],
        variants=[],
        batch=args.speed_batch,
        rounds=args.rounds,
        device=device,
        precision=args.precision or choose_precision(device),
        compiled=None,
        measures_memory=False,
        peer=None,
        peer_name="",
    )
    own = denoiser(str(pipeline))
    native = own.config["sample_size"] * own.pixels
    return replace(large, denoiser=own, sizes=[args.size or native]), large


def run(job: Job) -> None:
    """Measure both halves, or the one that was asked for, and write the results."""
    if not job.args.speed_only:
        measure_quality(job.plan)
    if not job.args.quality_only:
        measure_speed(job.plan)
    write(job.plan.folder, {"command": job.args.command} | joined_results(job.plan))


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, table.md and the plot, each atomically."""
    table = table_and_plot.table(results)
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", f"{table}\n\n{table_and_plot.settings_text(results)}\n")
    if table_and_plot.has_both_halves(results):
        with atomic_write(folder / "frontier.png") as file:
            table_and_plot.plot(results, file)
    print(f"{table}\n\n{folder}")


def add_options(parser: ArgumentParser) -> None:
    names = "; ".join(candidate.name for candidate in CANDIDATES)
    parser.epilog = f"{parser.epilog} Candidates: {names}."
    add = parser.add_argument
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--quality-only", action="store_true", help="no times")
    half.add_argument("--speed-only", action="store_true", help="no images")
    add("--only", nargs="+", metavar="NAME", help="these candidates and unpatched (all)")
    add("--no-peer", action="store_true", help=f"without {PEER}, which comes from PyPI")
    add("--peer-cache", type=Path, default=Path("runs/peers"), help="(%(default)s)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add("--output", type=Path, default=Path("runs/frontier"), help="folder (%(default)s)")
    add_half_options(parser)


def add_half_options(parser: ArgumentParser) -> None:
    """The options of one half alone."""
    add = parser.add_argument_group("quality").add_argument
    add("--model", help="folder of an embedded-style pipeline (the embedded one)")
    add("--num-images", type=number(int, 1, 10_000), default=64, help="(%(default)s)")
    add("--num-reference", type=number(int, 1, 10_000), default=1000, help="(%(default)s)")
    add("--steps", type=number(int, 1, 1000), default=EMBEDDED.steps, help="(%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=EMBEDDED.guidance, help="(%(default)s)")
    add("--size", type=number(int, 8, 100_000), help="pixels (the model's own)")
    add("--batch", type=number(int, 1, 1024), default=8, help="images sampled at once (8)")
    add = parser.add_argument_group("speed").add_argument
    add("--speed-model", default="sd15", help="sd15, sdxl or a folder, its config only (sd15)")
    add("--speed-size", type=number(int, 8, 100_000), default=512, help="pixels (%(default)s)")
    add("--speed-batch", type=number(int, 1, 1024), default=2, help="2: one image with guidance")
    add("--rounds", type=number(int, 1, 100_000), default=5, help="(%(default)s)")


main = Command(
    "frontier",
    add_options,
    prepare,
    run,
    resumes=True,
    failures=(FloatingPointError, PeerError, OSError),
)
