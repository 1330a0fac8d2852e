"""The command of scripts/train_shapes.py: options, checks, and which stages to train."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder
from benchmarks.training.few_step import train_few_step
from benchmarks.training.loop import CheckpointError, check_checkpoint
from benchmarks.training.shapes_models import (
    Settings,
    train_autoencoder,
    train_classifier,
    train_denoiser,
)
from benchmarks.training.transformer import train_transformer
from tomesd.pictures.device import choose_device

TRAIN = {
    "autoencoder": train_autoencoder,
    "denoiser": train_denoiser,
    "classifier": train_classifier,
    "few-step": train_few_step,
    "transformer": train_transformer,
}


@dataclass(frozen=True)
class Job:
    """Which models to train, and their settings."""

    models: tuple[str, ...]
    settings: Settings


def prepare(args: Namespace) -> Job:
    """Check the arguments and the checkpoints that they would resume."""
    models = tuple(TRAIN) if args.stage == "all" else (args.stage,)
    settings = Settings(
        pictures=args.pictures,
        steps_scale=args.steps_scale,
        device=choose_device(args.device),
        precision=args.precision,
        compile=args.compile,
        work=args.work,
        output=args.output,
    )
    for name in ("work", "output"):
        try:
            check_folder(getattr(args, name))
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from error
    weights = settings.autoencoder_weights
    if "denoiser" in models and "autoencoder" not in models and not weights.is_file():
        raise FileNotFoundError(
            f"stage denoiser needs {weights.parent}, which --stage autoencoder makes"
        )
    for name, stage in settings.stages.items():
        if name.removesuffix("-64").removesuffix("-128") in models:
            check_checkpoint(args.work / f"{name}.pt", stage, settings.metadata)
    return Job(models, settings)


def run(job: Job) -> None:
    for name in job.models:
        torch.manual_seed(0)
        TRAIN[name](job.settings)


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--stage", choices=("all", *TRAIN), default="all", help="(%(default)s)")
    add("--pictures", type=number(int, 1, 10**6), default=16384, help="to train on (%(default)s)")
    add("--steps-scale", type=number(float, 1e-4, 100), default=1.0, help="times all steps (1)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(%(default)s)")
    add(
        "--compile",
        action=BooleanOptionalAction,
        default=True,
        help="train compiled: twice as fast after a few minutes of compiling (yes)",
    )
    add("--work", type=Path, default=Path("runs/shapes"), help="checkpoints, data (%(default)s)")
    add("--output", type=Path, default=Path("runs/shapes/models"), help="models (%(default)s)")


main = Command(
    "train_shapes",
    add_options,
    prepare,
    run,
    resumes=True,
    failures=(CheckpointError, OSError),
)
