"""How much merging changes a pipeline's pictures, and whether they still show what was asked."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import tomesd
from tomesd import RatioSchedule
from tomesd.evaluation.image_file import save_image, whole
from tomesd.evaluation.sampling import Sampling, sample
from tomesd.shapes import pipeline as shapes
from tomesd.shapes.world import HELD_OUT, Scene, scene

# What is compared: the name in the table, and what is given to apply_patch, from the table's ratio.
# Whole blocks are the default; self-attention is the recipe of ToMeSD; "+ log size" is proportional
# attention. The schedules merge in some of the steps only, or not equally much in all.
CASES: dict[str, Callable[[float], dict[str, Any]]] = {
    "whole blocks": lambda ratio: {"ratio": ratio, "prop_attn": False},
    "whole blocks + log size": lambda ratio: {"ratio": ratio},
    "self-attention": lambda ratio: {"ratio": ratio, "merge_attn": True, "prop_attn": False},
    "self-attention + log size": lambda ratio: {"ratio": ratio, "merge_attn": True},
    "keys and values": lambda ratio: {"ratio": ratio, "merge_queries": False, "prop_attn": False},
    "keys and values + log size": lambda ratio: {"ratio": ratio, "merge_queries": False},
    "half the ratio in all steps": lambda ratio: {"ratio": ratio / 2},
    "in the first half of the steps": lambda ratio: {"ratio": RatioSchedule.first(ratio, 0.5)},
    "in the second half": lambda ratio: {"ratio": RatioSchedule.last(ratio, 0.5)},
    "in all but the first fifth": lambda ratio: {"ratio": RatioSchedule.last(ratio, 0.2)},
    "in all but the first tenth": lambda ratio: {"ratio": RatioSchedule.last(ratio, 0.1)},
    "less and less, down to 0": lambda ratio: {"ratio": RatioSchedule.ramp(ratio, 0)},
    "more and more, up from 0": lambda ratio: {"ratio": RatioSchedule.ramp(0, ratio)},
    "random pruning": lambda ratio: {"ratio": ratio, "method": "prune"},
}


def held_out(count: int) -> list[Scene]:
    """Scenes that no model was trained on, the same ones every time."""
    if not 0 < count <= len(HELD_OUT):
        raise ValueError(f"count must be from 1 to {len(HELD_OUT)}, got {count}")
    return [scene(index) for index in HELD_OUT[:count]]


def pictures(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    folder: Path,
    settings: Mapping[str, Any],
    batch: int = 8,
) -> list[Image.Image]:
    """One picture for each prompt, seeded with its index; those already in the folder are kept.

    >>> images = pictures(pipe, ["a red heart"], Sampling(25, 4.0), Path("out"), {"ratio": 0.5})

    settings: what `apply_patch` is given.

    Each is written whole as <index>.png with its settings, so an interrupted run goes on. A batch
    that lacks one is sampled again as a whole: in other company, rounding would differ.
    """
    starts = range(0, len(prompts), batch)
    with tomesd.patched(pipe, **settings):
        for start in tqdm(starts, desc=folder.name, unit="batch"):
            indices = range(start, min(start + batch, len(prompts)))
            if all(_path(folder, index).exists() for index in indices):
                continue
            asked = [prompts[index] for index in indices]
            images = sample(pipe, asked, indices, sampling, batch)
            for index, image in zip(indices, images, strict=True):
                told = {"prompt": prompts[index], "seed": index, **settings, **vars(sampling)}
                told["ratio"] = str(settings["ratio"])
                save_image(image, _path(folder, index), told)
    return [Image.open(_path(folder, i)).convert("RGB") for i in range(len(prompts))]


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.png"


def run_folder(root: Path, settings: Mapping[str, Any]) -> Path:
    """A folder of its own for these settings: other settings never mix with its pictures."""
    text = json.dumps(settings, sort_keys=True, default=str)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:12]
    file = folder / "settings.json"
    if not file.exists():
        with whole(file) as partial:
            partial.write_text(text + "\n")
    return folder


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, 8 bits; infinite for equal pictures.

    >>> psnr(Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 255))
    0.0
    """
    difference = np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    error = np.mean(difference**2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def shown_right(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> list[bool]:
    """Whether each picture shows its scene's shape, color, kind and ground, by the classifier."""
    classifier = shapes.load_classifier()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        read = [answer for part in pixels.split(64) for answer in shapes.read(classifier(part)[0])]
    return [answer == scene.labels for answer, scene in zip(read, scenes, strict=True)]
