"""The command of scripts/train_classifier.py: training with several r, and their accuracy."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.classifier.data import shapes_data
from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder, digest, settings_folder
from benchmarks.training import architectures
from benchmarks.training.data import labelled_pictures
from benchmarks.training.loop import CheckpointError, Stage
from benchmarks.training.merged_classifier import TrainingSetup, table, train_and_measure
from tomesd.pictures.classifiers import check_model
from tomesd.pictures.device import choose_device, device_name
from tomesd.pictures.files import versions
from tomesd.shapes import names


@dataclass(frozen=True)
class Job:
    """What to train: the arguments, r in ascending order, and where results are kept."""

    args: Namespace
    values: list[int]
    stage: Stage
    device: torch.device
    folder: Path


def prepare(args: Namespace) -> Job:
    device = choose_device(args.device)
    values = sorted(set(args.r))
    if values[0] != 0:
        raise ValueError(f"r must include 0, which the others are compared with, got {args.r}")
    check_folder(args.output)
    check_model(None)
    stage = chosen_stage(args)
    folder = settings_folder(args.output, identity(args, stage, device))
    return Job(args, values, stage, device, folder)


def run(job: Job) -> None:
    """Train, measure and print the table."""
    args, stage = job.args, job.stage
    config = architectures.build_classifier().config
    drawn = labelled_pictures(args.pictures, config, args.output / "pictures", job.device)
    setup = TrainingSetup(stage, drawn, args.from_scratch)
    data = shapes_data(args.num_images)
    results = train_and_measure(setup, job.values, data, args.rounds, stage.batch, job.folder)
    start = "random weights" if args.from_scratch else "the embedded classifier's weights"
    print(
        f"{stage.steps} steps of {stage.batch} pictures from {start}; an epoch is {len(drawn[0])} "
        f"pictures; accuracy on {len(data)} others.\n"
    )
    print(table(results, job.values, len(drawn[0]) / stage.batch))
    print(f"\n{job.folder / 'results.json'}")


def chosen_stage(args: Namespace) -> Stage:
    """From scratch as long as the embedded classifier was trained; else fewer steps at a lower
    learning rate."""
    steps, lr, warmup = (3600, 1e-3, 300) if args.from_scratch else (300, 5e-5, 30)
    return Stage("", args.steps or steps, args.batch, args.lr or lr, warmup)


def identity(args: Namespace, stage: Stage, device: torch.device) -> dict[str, Any]:
    """Everything that results depend on but r."""
    return {
        "from_scratch": args.from_scratch,
        "weights": None if args.from_scratch else digest(names.ASSETS / "classifier"),
        "stage": vars(stage),
        "pictures": args.pictures,
        "images": args.num_images,
        "rounds": args.rounds,
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        **versions("tomesd", "torch", "transformers"),
    }


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--r", type=number(int, 0, 10_000), nargs="+", default=[0, 16, 28], help="(0 16 28)")
    add("--from-scratch", action="store_true", help="start with random weights")
    add("--steps", type=number(int, 1, 10**6), help="of training (300; 3600 from scratch)")
    add("--lr", type=number(float, 1e-8, 1), help="learning rate (5e-5; 1e-3 from scratch)")
    add("--batch", type=number(int, 1, 4096), default=32, help="(32)")
    add("--pictures", type=number(int, 1, 10**6), default=16384, help="an epoch (%(default)s)")
    add("--num-images", type=number(int, 1, 100_000), default=1000, help="accuracy (%(default)s)")
    add("--rounds", type=number(int, 1, 10_000), default=7, help="steps timed with each r (7)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--output", type=Path, default=Path("runs/train_classifier"), help="(%(default)s)")


main = Command(
    "train_classifier",
    add_options,
    prepare,
    run,
    resumes=True,
    failures=(CheckpointError, OSError),
)
