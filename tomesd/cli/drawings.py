"""The work of `tomesd visualize`."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

import tomesd
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.pictures import classifiers, sampling, token_pages
from tomesd.pictures.files import check_output, open_image
from tomesd.shapes import world
from tomesd.vit.settings import ViTSettings

Drawing = tuple[Image.Image, dict[str, Any]]


def check(given: dict[str, Any]) -> None:
    """Set defaults, and raise for what is known to be wrong before anything is loaded."""
    for_vits, for_denoisers = ("image", "r", "layers"), ("ratio", "steps")
    others, why = (
        (for_denoisers, "allowed with --prompt only")
        if given["prompt"] is None
        else (for_vits, "not allowed with --prompt")
    )
    for name in others:
        if given[name] is not None:
            raise ValueError(f"{name} is {why}, got {given[name]}")
    check_output(given["output"])
    if given["prompt"] is not None:
        given["ratio"] = 0.5 if given["ratio"] is None else given["ratio"]
        if DiffusionSettings(ratio=given["ratio"]).ratio == 0:
            raise ValueError("ratio must be above 0, or nothing merges, got 0")
        sampling.check_model(given["model"])
        return
    given["r"] = given["r"] or 8
    ViTSettings(r=given["r"])
    if given["image"] is not None:
        open_image(given["image"])
    classifiers.check_model(given["model"])


def draw(given: Mapping[str, Any]) -> Drawing:
    """The page and its metadata."""
    return _of_classifier(given) if given["prompt"] is None else _of_denoiser(given)


def _of_classifier(given: Mapping[str, Any]) -> Drawing:
    """The patches that a classifier merged, after several layers."""
    classifier = classifiers.load_classifier(given["model"])
    r = given["r"]
    if given["image"] is None:
        name, image = "a drawn picture", draw_scene(given["seed"])
    else:
        name, image = given["image"].name, open_image(given["image"])
    image = classifier.fit(image)
    tomesd.apply_patch(classifier.model, r=r)
    with tomesd.trace(classifier.model) as traced, torch.no_grad():
        classifier.logits(classifier.prepare([image]))
    layers = given["layers"] or token_pages.quarters(len(traced))
    if max(layers) >= len(traced):
        raise ValueError(f"layers must be from 0 to {len(traced) - 1}, got {max(layers)}")
    title = f"{classifier.name} on {name}: r = {r}"
    image = token_pages.enlarged(image, traced[0].grid)
    page = token_pages.layers_picture(image, traced, layers, title)
    return page, {"model": classifier.name, "image": name, "r": r}


def _of_denoiser(given: Mapping[str, Any]) -> Drawing:
    """The tokens that a pipeline's denoiser merged, for several steps and each block."""
    pipe = sampling.load_pipeline(given["model"])
    chosen = sampling.choose(pipe, given["model"], given["steps"])
    prompt, seed, ratio = given["prompt"], given["seed"], given["ratio"]
    tomesd.apply_patch(pipe, ratio)
    with tomesd.trace(pipe) as traced:
        (image,) = sampling.sample(pipe, [prompt], [seed], chosen)
    caption = f"ratio {ratio:g}, {chosen.steps} steps, seed {seed}"
    page = token_pages.denoiser_page(image, traced, prompt, caption)
    return page, {"prompt": prompt, "ratio": ratio, "seed": seed, "steps": chosen.steps}


def draw_scene(seed: int) -> Image.Image:
    """A picture of the Shapes world that no model was trained on."""
    return world.draw(world.scene(world.HELD_OUT[seed % len(world.HELD_OUT)]))
