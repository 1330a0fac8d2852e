"""Train the Shapes classifier while tokens merge: python scripts/train_classifier.py

One model for each r, all alike but for it: the time of an epoch, how many pictures it gets right
that it was not trained on, and the same when it is read with the other r (ToMe, section 4.1). By
default training goes on from the embedded classifier's weights; --from-scratch begins anew, as
scripts/train_shapes.py does. The same command goes on where it was stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.classifier import classify
from benchmarks.classifier.classifiers import check_model
from benchmarks.common.arguments import number, run_script, script_parser
from benchmarks.common.device import choose_device
from benchmarks.common.files import check_folder, versions
from benchmarks.fid import fid
from benchmarks.quality.cases import run_folder
from benchmarks.training import merged_training
from benchmarks.training.loop import Stage, labelled_pictures
from tomesd.shapes import pipeline as shapes


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
        values = sorted(set(args.r))
        if values[0] != 0:
            raise ValueError(f"r must have 0, which the others are compared with, got {args.r}")
        check_folder(args.output)
        check_model(None)
        stage = choose_stage(args)
        folder = run_folder(args.output, identity(args, stage, device))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    config = shapes.build_classifier().config
    drawn = labelled_pictures(args.pictures, config, args.output / "pictures", device)
    course = merged_training.TrainingSetup(stage, drawn, args.from_scratch)
    data = classify.shapes_data(args.num_images)
    results = merged_training.run(course, values, data, args.rounds, stage.batch, folder)
    begin = "random weights" if args.from_scratch else "the embedded classifier's weights"
    print(
        f"{stage.steps} steps of {stage.batch} pictures from {begin}; an epoch is {len(drawn[0])} "
        f"pictures; read: {len(data)} others.\n"
    )
    print(merged_training.table(results, values, len(drawn[0]) / stage.batch))
    print(f"\n{folder / 'results.json'}")


def choose_stage(args: argparse.Namespace) -> Stage:
    """As long as the embedded classifier was trained, or for a while at a lower rate."""
    steps, lr, warmup = (3600, 1e-3, 300) if args.from_scratch else (300, 5e-5, 30)
    return Stage("", args.steps or steps, args.batch, args.lr or lr, warmup)


def identity(args: argparse.Namespace, stage: Stage, device: torch.device) -> dict[str, Any]:
    """Everything that figures depend on but r."""
    return {
        "from_scratch": args.from_scratch,
        "weights": None if args.from_scratch else fid.digest(shapes.ASSETS / "classifier"),
        "stage": vars(stage),
        "pictures": args.pictures,
        "images": args.num_images,
        "rounds": args.rounds,
        "device": str(device),
        "device_name": fid.device_name(device),
        "threads": torch.get_num_threads(),
        **versions("tomesd", "torch", "transformers"),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--r", type=number(int, 0, 10_000), nargs="+", default=[0, 16, 28], help="(0 16 28)")
    add("--from-scratch", action="store_true", help="begin with random weights")
    add("--steps", type=number(int, 1, 10**6), help="of training (300; 3600 from scratch)")
    add("--lr", type=number(float, 1e-8, 1), help="learning rate (5e-5; 1e-3 from scratch)")
    add("--batch", type=number(int, 1, 4096), default=32, help="(32)")
    add("--pictures", type=number(int, 1, 10**6), default=16384, help="an epoch (%(default)s)")
    add("--num-images", type=number(int, 1, 100_000), default=1000, help="to read (%(default)s)")
    add("--rounds", type=number(int, 1, 10_000), default=7, help="steps timed with each r (7)")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--output", type=Path, default=Path("runs/train_classifier"), help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, goes_on=True)
