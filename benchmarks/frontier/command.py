"""Quality over speed of the ways to merge tokens: python scripts/frontier.py

Candidates are settings of this project, ways that it does not have (keys and values of a plain
grid, maps kept over steps), random pruning and PyPI's tomesd. Quality is that of the embedded
pipeline's pictures: PSNR to the unpatched ones of the same seeds, and the Fréchet distance on the
features of the embedded classifier. Speed is that of a full-size UNet with random weights, all
candidates in turns. The folder gets results.json, table.md and, once both are there, frontier.png.

The same command goes on where it was stopped, and one with other candidates (--only) adds them to
those that the folder holds. --quality-only and --speed-only do one half, at another time or on
another machine; what the folder holds of the other half stays in the results. Figures of another
size, thread count or version are never mixed: they want an --output of their own.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from benchmarks.common.arguments import number, run_script
from benchmarks.common.device import PRECISIONS, choose_device, choose_precision
from benchmarks.common.files import check_folder, atomic_write
from benchmarks.fid import fid
from benchmarks.frontier import frontier, frontier_report
from benchmarks.frontier.candidates import CANDIDATES, PEER, chosen
from benchmarks.pictures.reference import drawn
from benchmarks.pictures.picture_set import Model, Run
from benchmarks.pictures.sampling import EMBEDDED, Sampling, check_model
from benchmarks.quality.cases import run_folder
from benchmarks.speed.forwards import Setup
from benchmarks.models.unets import denoiser
from benchmarks.peer.process import PeerError, install_peer
from tomesd.shapes.pipeline import ASSETS


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        plan = prepare(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
    try:
        if not args.speed_only:
            frontier.measure_quality(plan)
        if not args.quality_only:
            frontier.measure_speed(plan)
        results = frontier.results(plan)
        given = sys.argv[1:] if argv is None else argv
        results["command"] = shlex.join(["python", "scripts/frontier.py", *given])
        write(plan.folder, results)
    except (FloatingPointError, PeerError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}\nWhat is done stays; the same command goes on.")


def prepare(args: argparse.Namespace) -> frontier.Plan:
    """Everything checked, before any work is done; raises what is wrong."""
    check_folder(args.output)
    candidates = chosen(args.only, with_peer=not args.no_peer)
    check_model(args.model)
    pipeline = Path(args.model) if args.model else ASSETS / "pipeline"
    if not pipeline.is_dir():
        raise FileNotFoundError(f"model must be a pipeline's folder, got {args.model!r}")
    prompts = fid.prompts("shapes", args.num_images)
    reference = drawn(args.num_reference)
    frontier.FEATURES.check()
    device = choose_device(args.device)
    precision = args.precision or choose_precision(device)
    large = Setup(
        denoiser=denoiser(args.speed_model),
        sizes=[args.speed_size],
        variants=[],
        batch=args.speed_batch,
        rounds=args.rounds,
        device=device,
        precision=precision,
        compiled=None,
        measures_memory=False,
        peer=None,
        peer_name="",
    )
    small = replace(large, denoiser=denoiser(str(pipeline)))
    native = small.denoiser.config["sample_size"] * small.denoiser.pixels
    side = args.size or native
    small = replace(small, sizes=[side])
    for name, setup in (("size", small), ("speed-size", large)):
        pixels = setup.denoiser.pixels
        if setup.sizes[0] % pixels:
            raise ValueError(f"{name} must be a multiple of {pixels}, got {setup.sizes[0]}")
        frontier.work_left(setup, candidates)  # raises for what cannot be patched
    sampling = Sampling(args.steps, args.guidance, side, side)
    model = Model(args.model, str(device), PRECISIONS[precision], None)
    told = fid.identity(model, precision, prompts, sampling, args.batch, None)
    # Each picture says of itself how it was merged: new candidates join those that are there.
    del told["merging"]
    if not args.speed_only:
        about = frontier.about_quality(told, device, reference.name)
        frontier.check_held(args.output / "quality.json", about)
    if not args.quality_only:
        frontier.check_held(args.output / "speed.json", frontier.about_speed(large))
    if any(candidate.is_peer for candidate in candidates):
        peer = install_peer(PEER, args.peer_cache)
        small, large = (replace(each, peer=peer, peer_name=PEER) for each in (small, large))
    folder = run_folder(args.output / "pictures", told)
    run = Run(folder, [*candidates], prompts, sampling, args.batch)
    return frontier.Plan(
        args.output, candidates, run, model, pipeline, reference, told, small, large
    )


def write(folder: Path, results: dict[str, Any]) -> None:
    """results.json, table.md and the picture, each written whole."""
    table = frontier_report.table(results)
    with atomic_write(folder / "results.json") as file:
        file.write_text(json.dumps(results, indent=1) + "\n")
    with atomic_write(folder / "table.md") as file:
        file.write_text(f"{table}\n\n{frontier_report.about(results)}\n")
    if frontier_report.can_plot(results):
        with atomic_write(folder / "frontier.png") as file:
            frontier_report.plot(results, file)
    print(f"{table}\n\n{folder}")


def build_parser() -> argparse.ArgumentParser:
    names = "; ".join(candidate.name for candidate in CANDIDATES)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=f"Candidates: {names}."
    )
    add = parser.add_argument
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--quality-only", action="store_true", help="no times")
    half.add_argument("--speed-only", action="store_true", help="no pictures")
    add("--only", nargs="+", metavar="NAME", help="these candidates; unpatched is always there")
    add("--no-peer", action="store_true", help=f"without {PEER}, which is got from PyPI")
    add("--peer-cache", type=Path, default=Path("runs/peers"), help="(%(default)s)")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add("--output", type=Path, default=Path("runs/frontier"), help="folder (%(default)s)")
    group = parser.add_argument_group("quality")
    add = group.add_argument
    add("--model", help="folder of a pipeline of the Shapes world (the embedded one)")
    add("--num-images", type=number(int, 1, 10_000), default=64, help="(%(default)s)")
    add("--num-reference", type=number(int, 1, 10_000), default=1000, help="(%(default)s)")
    add("--steps", type=number(int, 1, 1000), default=EMBEDDED.steps, help="(%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=EMBEDDED.guidance, help="(%(default)s)")
    add("--size", type=number(int, 8, 100_000), help="pixels (what the model was made for)")
    add("--batch", type=number(int, 1, 1024), default=8, help="pictures sampled at once (8)")
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add("--speed-model", default="sd15", help="sd15, sdxl or a folder, its config only (sd15)")
    add("--speed-size", type=number(int, 8, 100_000), default=512, help="pixels (%(default)s)")
    add("--speed-batch", type=number(int, 1, 1024), default=2, help="2: one picture with guidance")
    add("--rounds", type=number(int, 1, 100_000), default=5, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, goes_on=True)
