"""The command of scripts/visualize.py: which tokens merged, drawn over a picture."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError

import tomesd
from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_output, destination, save_image, versions
from benchmarks.models import classifiers
from benchmarks.pictures import sampling, token_pages
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.shapes.world import HELD_OUT, draw, scene
from tomesd.vit.settings import ViTSettings

# A token of this many pixels has a border that is easy to see.
PIXELS_PER_TOKEN = 12


class Drawing(NamedTuple):
    """The page, its metadata, and its file or folder."""

    page: Image.Image
    metadata: dict[str, Any]
    output: Path


def prepare(args: Namespace) -> Drawing:
    check(args)
    page, metadata = draw_denoiser(args) if args.prompt is not None else draw_classifier(args)
    return Drawing(page, metadata, args.output)


def run(drawing: Drawing) -> None:
    path = destination(drawing.output)
    save_image(drawing.page, path, drawing.metadata | versions("tomesd", "torch"))
    print(path)


def draw_classifier(args: Namespace) -> tuple[Image.Image, dict[str, Any]]:
    """The patches that a classifier merged, after several layers."""
    classifier = classifiers.load_classifier(args.model)
    if args.image is None:
        name, image = "a drawn picture", draw(scene(HELD_OUT[args.seed % len(HELD_OUT)]))
    else:
        name, image = args.image.name, Image.open(args.image)
    image = classifier.fit(image)
    tomesd.apply_patch(classifier.model, r=args.r)
    with tomesd.trace(classifier.model) as traced, torch.no_grad():
        classifier.logits(classifier.prepare([image]))
    layers = args.layers or sorted({len(traced) * i // 4 - 1 for i in (1, 2, 3, 4)} - {-1})
    if max(layers) >= len(traced):
        raise ValueError(f"layers must be from 0 to {len(traced) - 1}, got {max(layers)}")
    title = f"{classifier.name} on {name}: r = {args.r}"
    page = token_pages.layers_picture(_enlarged(image, traced[0].grid), traced, layers, title)
    return page, {"model": classifier.name, "image": name, "r": args.r}


def draw_denoiser(args: Namespace) -> tuple[Image.Image, dict[str, Any]]:
    """The tokens that a pipeline's denoiser merged, for several steps and each block."""
    pipe = sampling.load_pipeline(args.model)
    chosen = sampling.choose(pipe, args.model, args.steps)
    tomesd.apply_patch(pipe, args.ratio)
    with tomesd.trace(pipe) as traced:
        (image,) = sampling.sample(pipe, [args.prompt], [args.seed], chosen)
    last = traced[-1].step
    steps = sorted({0, last // 2, last})
    metadata = {
        "prompt": args.prompt,
        "ratio": args.ratio,
        "seed": args.seed,
        "steps": chosen.steps,
    }
    finest = max((record.grid for record in traced), key=lambda grid: grid[0])
    caption = f"ratio {args.ratio:g}, {chosen.steps} steps, seed {args.seed}"
    page = token_pages.steps_picture(_enlarged(image, finest), traced, steps, args.prompt, caption)
    return page, metadata


def _enlarged(image: Image.Image, grid: tuple[int, ...]) -> Image.Image:
    times = max(1, -(-PIXELS_PER_TOKEN * grid[0] // image.height))
    return image.resize((image.width * times, image.height * times), Image.Resampling.LANCZOS)


def check(args: Namespace) -> None:
    """Raise for what is known to be wrong before loading anything."""
    for_vits = {"image": args.image, "r": args.r, "layers": args.layers}
    for_denoisers = {"ratio": args.ratio, "steps": args.steps}
    others, why = (
        (for_denoisers, "allowed with --prompt only")
        if args.prompt is None
        else (for_vits, "not allowed with --prompt")
    )
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} is {why}, got {value}")
    check_output(args.output)
    if args.prompt is not None:
        args.ratio = 0.5 if args.ratio is None else args.ratio
        if DiffusionSettings(ratio=args.ratio).ratio == 0:
            raise ValueError("ratio must be above 0, or nothing merges, got 0")
        sampling.check_model(args.model)
        return
    args.r = args.r or 8
    ViTSettings(r=args.r)
    if args.image is not None:
        _check_image(args.image)
    classifiers.check_model(args.model)


def _check_image(path: Path) -> None:
    try:
        with Image.open(path) as image:
            image.verify()
    except UnidentifiedImageError as error:
        raise ValueError(f"image must be a picture, got {str(path)!r}") from error


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", type=Path, help="any picture (a drawn one of the Shapes world)")
    add("--model", help="timm:<name>, torchvision:<name> or transformers folder (embedded)")
    add("--r", type=number(int, 1, 10_000), help="tokens to merge in each layer (8)")
    add("--layers", type=number(int, 0, 1000), nargs="+", help="to draw, from 0 (four of them)")
    add("--prompt", help="draw the merged tokens of a picture made from this prompt")
    add("--ratio", type=float, help="with --prompt: share of the tokens to merge (0.5)")
    add("--steps", type=number(int, 1, 1000), help="with --prompt (embedded: 25)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of the drawn or made picture (0)")
    add(
        "--output",
        type=Path,
        default=Path("runs/visualize"),
        help="PNG file or folder (%(default)s)",
    )


main = Command("visualize", add_options, prepare, run)
