"""Draw which tokens merge: python scripts/visualize.py photo.png --r 16

Patches that a Vision Transformer merged into one token are painted in the average colour of their
region, with a border in a colour of their own (ToMe, Figure 4), after several layers. By default it
is the embedded classifier of the Shapes world, and without a picture one of that world is drawn.

With --prompt instead, a picture is made with the embedded pipeline (or --model, another one) and
drawn with the tokens that merged, for several steps and each block.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

import tomesd
from benchmarks.classifier import classifiers
from benchmarks.common.arguments import number, run_script, script_parser
from benchmarks.common.files import check_output, destination, save_image, versions
from benchmarks.pictures import sampling
from tomesd import visualize
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.shapes.world import HELD_OUT, draw, scene
from tomesd.vit.settings import METHODS, ViTSettings

# So many pixels for a token make its border easy to see.
PIXELS_PER_TOKEN = 12


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        page, about = denoiser(args) if args.prompt is not None else classifier(args)
    except (ValueError, TypeError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    path = destination(args.output)
    save_image(page, path, about | versions("tomesd", "torch"))
    print(path)


def classifier(args: argparse.Namespace) -> tuple[Image.Image, dict[str, Any]]:
    found = classifiers.load_classifier(args.model)
    if args.image is None:
        what, image = "a drawn picture", draw(scene(HELD_OUT[args.seed % len(HELD_OUT)]))
    else:
        what, image = args.image.name, Image.open(args.image)
    image = found.fit(image)
    tomesd.apply_patch(found.model, r=args.r, method=args.method)
    with tomesd.trace(found.model) as traced, torch.no_grad():
        found.logits(found.prepare([image]))
    layers = args.layers or sorted({len(traced) * i // 4 - 1 for i in (1, 2, 3, 4)} - {-1})
    if max(layers) >= len(traced):
        raise ValueError(f"layers must be from 0 to {len(traced) - 1}, got {max(layers)}")
    title = f"{found.name} on {what}: r = {args.r}"
    page = visualize.layers_picture(_enlarged(image, traced[0].grid), traced, layers, title)
    return page, {"model": found.name, "image": what, "r": args.r, "method": args.method}


def denoiser(args: argparse.Namespace) -> tuple[Image.Image, dict[str, Any]]:
    pipe = sampling.load_pipeline(args.model)
    how = sampling.choose(pipe, args.model, args.steps)
    tomesd.apply_patch(pipe, args.ratio)
    with tomesd.trace(pipe) as traced:
        (image,) = sampling.sample(pipe, [args.prompt], [args.seed], how)
    last = traced[-1].step
    steps = sorted({0, last // 2, last})
    about = {"prompt": args.prompt, "ratio": args.ratio, "seed": args.seed, "steps": how.steps}
    finest = max((record.grid for record in traced), key=lambda grid: grid[0])
    caption = f"ratio {args.ratio:g}, {how.steps} steps, seed {args.seed}"
    page = visualize.steps_picture(_enlarged(image, finest), traced, steps, args.prompt, caption)
    return page, about


def _enlarged(image: Image.Image, grid: tuple[int, ...]) -> Image.Image:
    times = max(1, -(-PIXELS_PER_TOKEN * grid[0] // image.height))
    return image.resize((image.width * times, image.height * times), Image.Resampling.LANCZOS)


def check(args: argparse.Namespace) -> None:
    """Raise what can be known to be wrong before loading anything."""
    for_vits = {"image": args.image, "r": args.r, "layers": args.layers, "method": args.method}
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
    args.r, args.method = args.r or 8, args.method or "bipartite"
    ViTSettings(r=args.r, method=args.method)
    if args.image is not None:
        try:
            with Image.open(args.image) as image:
                image.verify()
        except UnidentifiedImageError as error:
            raise ValueError(f"image must be a picture, got {str(args.image)!r}") from error
    classifiers.check_model(args.model)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("image", nargs="?", type=Path, help="any picture (one of the Shapes world is drawn)")
    add("--model", help="timm:<name>, torchvision:<name> or transformers folder (embedded)")
    add("--r", type=number(int, 1, 10_000), help="tokens to merge in each layer (8)")
    add("--layers", type=number(int, 0, 1000), nargs="+", help="to draw, from 0 (four of them)")
    add("--method", choices=METHODS, help="how tokens are chosen (bipartite)")
    add("--prompt", help="draw the merged tokens of a picture that is made from this")
    add("--ratio", type=float, help="with --prompt: share of the tokens to merge (0.5)")
    add("--steps", type=number(int, 1, 1000), help="with --prompt (embedded: 25)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of the drawn or made picture (0)")
    add(
        "--output",
        type=Path,
        default=Path("runs/visualize"),
        help="PNG file or folder (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    run_script(main)
