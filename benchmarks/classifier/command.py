"""Accuracy and speed of a merging classifier: python scripts/classify.py

Four parts, all of them by default: a sweep over r (ToMe, Figure 3), the choices of the method
(Table 1), the algorithms (Table 2), and random schedules against constant and decreasing ones
(Figures 2 and 7). Off the shelf: nothing is trained. By default the embedded classifier of the
Shapes world reads pictures that it was not trained on; a picture is right if its shape, its colour,
the background's kind and the background's colour are.

Throughput is that of the model alone, in turns with the unpatched one. Each row is written to
results.csv when it is done; the same command goes on where it was stopped.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.classifier import classify, classify_report
from benchmarks.classifier.classifiers import check_model, load_classifier
from benchmarks.common.arguments import number, run_script, script_parser
from benchmarks.common.device import PRECISIONS, choose_device
from benchmarks.common.files import check_folder, versions
from benchmarks.fid import fid
from benchmarks.quality.cases import run_folder
from tomesd.api import patched
from tomesd.shapes.pipeline import ASSETS

PICTURES = 1000


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = check(args)
        classifier = load_classifier(args.model, pretrained=not args.synthetic)
        classifier.model.to(device, PRECISIONS[args.precision])
        largest = classify.largest_r(classifier.model)
        with patched(classifier.model, r=0):
            layers = len(classify.vit_patch(classifier.model).seams)
        data = None if args.synthetic else load_data(args)
        pixels = timed_pixels(classifier, data, args.batch).to(device, PRECISIONS[args.precision])
        if data is not None:
            check_logits(classifier, data, pixels[:1])
        folder = run_folder(args.output, identity(args, data, device))
        classify.read(folder / "results.csv")
    except (ValueError, TypeError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    values = args.r or sorted({round(largest * i / 8) for i in range(9)})
    r = largest if args.ablation_r is None else args.ablation_r
    todo = classify.rows(args.parts, values, r, layers, 0 if data is None else args.num_schedules)
    measured = partial(
        classify.measure,
        classifier=classifier,
        data=data,
        pixels=pixels,
        rounds=args.rounds,
        batch=args.batch,
    )
    records = classify.run(todo, folder / "results.csv", measured, args.rounds)
    for part in args.parts:
        print(classify_report.table(records, part), end="\n\n")
    for path in (folder / "results.csv", *classify_report.plots(records, folder, classifier.name)):
        print(path)


def load_data(args: argparse.Namespace) -> classify.Data:
    if args.data is None:
        return classify.shapes_data(args.num_images)
    return classify.folder_data(args.data, args.num_images)


def check_logits(classifier: Any, data: classify.Data, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        count = classifier.logits(pixels).shape[1]
    if count != sum(data.groups):
        raise ValueError(
            f"data must have a folder for each of the model's {count} logits, "
            f"got {sum(data.groups)} folders in {data.name}"
        )


def timed_pixels(classifier: Any, data: classify.Data | None, batch: int) -> torch.Tensor:
    """One batch: pictures, again and again if there are few, or noise."""
    if data is not None:
        images = [data.load(i % len(data)) for i in range(batch)]
        return classifier.prepare([classifier.fit(image) for image in images])
    height, width = classifier.sides
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def identity(
    args: argparse.Namespace, data: classify.Data | None, device: torch.device
) -> dict[str, Any]:
    """Everything that figures depend on, but the row."""
    return {
        "model": args.model or "embedded",
        "weights": fid.digest(args.model or ASSETS / "classifier"),
        "synthetic": args.synthetic,
        "data": data.name if data else "synthetic",
        "images": len(data) if data else 0,
        "batch": args.batch,
        "rounds": args.rounds,
        "device": args.device,
        "device_name": fid.device_name(device),
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        **versions("tomesd", "torch", "timm", "torchvision", "transformers"),
    }


def check(args: argparse.Namespace) -> torch.device:
    """Raise what can be known to be wrong before loading anything."""
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
    args.parts = args.parts or list(classify.PARTS[:3] if args.synthetic else classify.PARTS)
    if args.synthetic and "schedules" in args.parts:
        raise ValueError("parts must not have schedules with synthetic: they need an accuracy")
    device = choose_device(args.device)
    args.device = str(device)
    check_folder(args.output)
    check_model(args.model)
    return device


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", help="timm:<name>, torchvision:<name> or transformers folder (embedded)")
    add("--data", type=Path, help="folder with one of pictures for each class, as --model's logits")
    add("--synthetic", action="store_true", help="noise and random weights: the speed alone")
    add("--parts", nargs="+", choices=classify.PARTS, help="(all)")
    add("--r", type=number(int, 0, 10_000), nargs="+", help="of the sweep (9, from 0 to all)")
    add("--ablation-r", type=number(int, 1, 10_000), help="of the other tables (the largest)")
    add("--num-images", type=number(int, 1, 100_000), default=PICTURES, help="(%(default)s)")
    add("--num-schedules", type=number(int, 0, 100_000), default=50, help="random ones (50)")
    add("--batch", type=number(int, 1, 4096), default=32, help="(32)")
    add("--rounds", type=number(int, 0, 10_000), default=7, help="for speed; 0 for none (7)")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--precision", choices=PRECISIONS, default="fp32", help="(fp32)")
    add("--output", type=Path, default=Path("runs/classify"), help="folder (%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, goes_on=True)
