"""The ways to merge that scripts/quality.py compares, and how good a case's pictures are."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import tomesd
from benchmarks.pictures.picture_set import Method, PictureSet, as_record
from benchmarks.pictures.reference import read
from tomesd import RatioSchedule
from tomesd.diffusion.settings import diffusion_settings
from tomesd.pictures.differences import psnr
from tomesd.shapes import pipeline as shapes
from tomesd.shapes.world import Scene

# The name in the table, and the arguments of apply_patch for the table's ratio. Whole blocks are
# the default; self-attention is the recipe of ToMeSD; "+ log size" is proportional attention. The
# schedules merge in some of the steps only, or at a ratio that changes from step to step.
CASES: dict[str, Callable[[float], dict[str, Any]]] = {
    "whole blocks": lambda ratio: {"ratio": ratio, "prop_attn": False},
    "whole blocks + log size": lambda ratio: {"ratio": ratio, "preset": "steady"},
    "self-attention": lambda ratio: {"ratio": ratio, "merge_attn": True, "prop_attn": False},
    "self-attention + log size": lambda ratio: {"ratio": ratio, "merge_attn": True},
    "keys and values": lambda ratio: {"ratio": ratio, "merge_queries": False, "prop_attn": False},
    "keys and values + log size": lambda ratio: {"ratio": ratio, "merge_queries": False},
    "half the ratio in all steps": lambda ratio: {"ratio": ratio / 2, "preset": "steady"},
    "in the first half of the steps": lambda ratio: {"ratio": RatioSchedule.first(ratio, 0.5)},
    "in the second half": lambda ratio: {"ratio": RatioSchedule.last(ratio, 0.5)},
    "in all but the first fifth": lambda ratio: {"ratio": RatioSchedule.last(ratio, 0.2)},
    "in all but the first tenth": lambda ratio: {"ratio": RatioSchedule.last(ratio, 0.1)},
    "less and less, down to 0": lambda ratio: {"ratio": RatioSchedule.ramp(ratio, 0)},
    "more and more, up from 0": lambda ratio: {"ratio": RatioSchedule.ramp(0, ratio)},
    "random pruning": lambda ratio: {"ratio": ratio, "method": "prune"},
}


@dataclass(frozen=True)
class Case(Method):
    """One of CASES at one of the table's ratios; method is its name there.

    >>> Case("in the second half", at=0.5).name
    'in the second half 0.5'
    """

    at: float = 0.0

    @property
    def ratio(self) -> float:
        return self.at

    @property
    def name(self) -> str:
        return f"{self.method} {self.at:g}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `apply_patch`."""
        return CASES[self.method](self.at)

    @property
    def merging(self) -> dict[str, Any]:
        options = self.arguments
        ratio, preset = options.pop("ratio"), options.pop("preset", None)
        return as_record(diffusion_settings(ratio, preset, options))

    def patched(self, pipe: Any) -> AbstractContextManager[Any]:
        return tomesd.patched(pipe, **self.arguments)


def measure_case(pictures: PictureSet, case: Case, scenes: Sequence[Scene]) -> dict[str, Any]:
    """A case's pictures compared with the unpatched ones, the set's first method.

    >>> measure_case(pictures, Case("whole blocks", at=0.5), scenes)["psnr"]
    32.6

    Raises OSError for a picture that is missing or broken.
    """
    images, unpatched = (load(pictures, method) for method in (case, pictures.methods[0]))
    return {
        "case": case.method,
        "ratio": case.at,
        "merging": case.merging,
        "psnr": float(np.mean(list(map(psnr, images, unpatched)))),
        "right": sum(correct(images, scenes)),
    }


def load(pictures: PictureSet, method: Method) -> list[Image.Image]:
    return [read(path) for path in pictures.paths(method)]


def correct(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> list[bool]:
    """Whether each picture shows its scene's shape, color, kind and ground, by the classifier."""
    classifier = shapes.load_classifier()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        answers = [
            answer for part in pixels.split(64) for answer in shapes.read(classifier(part)[0])
        ]
    return [answer == scene.labels for answer, scene in zip(answers, scenes, strict=True)]


def merge_rows(
    earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows, and those of earlier runs for other cases and ratios, in the order of CASES.

    >>> merge_rows(read_json(file)["rows"], rows)

    Earlier rows of a case that merges differently by now are left out.
    """
    measured = {(row["case"], row["ratio"]) for row in rows}
    kept = [
        row
        for row in earlier
        if (row["case"], row["ratio"]) not in measured
        and row["case"] in CASES
        and row["merging"] == Case(row["case"], at=row["ratio"]).merging
    ]
    order = list(CASES)
    return sorted([*kept, *rows], key=lambda row: (order.index(row["case"]), row["ratio"]))
