"""The command of scripts/dense.py: how close merged models stay to themselves."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown
from benchmarks.common.arguments import Command, number
from benchmarks.common.device import cpu_name
from benchmarks.common.files import check_folder, versions, write_json
from benchmarks.common.markdown import figure
from benchmarks.dense.measurements import SIDE, RotaryClassifier, angles_by_r, ways_by_speedup
from benchmarks.training import architectures
from benchmarks.training.data import MASK_CELLS, draw_pictures, labelled_pictures, to_unit
from benchmarks.training.loop import Stage, train
from benchmarks.training.losses import classifier_loss
from tomesd.shapes import pipeline as shapes
from tomesd.shapes.world import HELD_OUT, scene


def prepare(args: Namespace) -> Namespace:
    check_folder(args.output)
    return args


def run(args: Namespace) -> None:
    indices = HELD_OUT[: args.num_images]
    labels = torch.tensor([scene(index).labels for index in indices])
    config = architectures.build_classifier().config
    pixels = to_unit(draw_pictures(indices, config.image_size))
    ways = ways_by_speedup(shapes.load_classifier().eval(), args.speedup, pixels, labels, 32)
    config.image_size = SIDE
    drawn = labelled_pictures(args.pictures, config, args.output / "pictures", "cpu")
    torch.manual_seed(0)
    rotary = RotaryClassifier(config.num_labels, MASK_CELLS)
    stage = Stage("rotary", args.steps, 16, 2e-3, args.steps // 10)
    rotary.train()
    train(
        stage,
        rotary,
        lambda generator: classifier_loss(rotary, drawn, stage.batch, generator),
        args.output / f"rotary-{args.steps}.pt",
        {"pictures": args.pictures},
    )
    pixels = to_unit(draw_pictures(indices, SIDE))
    angles = angles_by_r(rotary.eval(), args.r, pixels, labels, 32)
    record = {
        "command": args.command,
        "environment": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            **versions("torch", "timm", "transformers"),
        },
        "rows": [*angles, *ways],
    }
    write_json(args.output / "results.json", record)
    print(angles_table(record["rows"]), ways_table(record["rows"]), sep="\n\n")


def angles_table(rows: list[dict[str, Any]]) -> str:
    return markdown.table(
        ["angle of a merged token", "r", "labels right, %", "similarity of patch features"],
        [
            [row["angle"], str(row["r"]), figure(row["right"], 1, 100), figure(row["closeness"], 4)]
            for row in rows
            if "angle" in row
        ],
    )


def ways_table(rows: list[dict[str, Any]]) -> str:
    return markdown.table(
        ["merges", "multiply-adds saved", "labels right, %", "similarity of patch features"],
        [
            [
                row["way"],
                figure(1 - 1 / row["speedup"], 0, 100) + "%",
                figure(row["right"], 1, 100),
                figure(row["closeness"], 4),
            ]
            for row in rows
            if "way" in row
        ],
    )


def add_options(parser: ArgumentParser) -> None:
    whole = number(int, 1, 1_000_000)
    parser.add_argument("--steps", type=whole, default=600, help="training steps (600)")
    parser.add_argument("--pictures", type=whole, default=4096, help="to train on (4096)")
    parser.add_argument("--num-images", type=whole, default=256, help="to measure on (256)")
    parser.add_argument("--r", type=whole, nargs="+", default=[4, 8, 12])
    parser.add_argument("--speedup", type=float, nargs="+", default=[1.2, 1.5, 1.8])
    parser.add_argument("--output", type=Path, default=Path("runs/dense"))


main = Command("dense", add_options, prepare, run, resumes=True)
