"""How much merging changes a pipeline's pictures, and whether they still show what was asked."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tomesd
from benchmarks.common.files import atomic_write
from benchmarks.pictures.picture_set import Row, Run
from tomesd import RatioSchedule
from tomesd.diffusion.settings import diffusion_settings
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


@dataclass(frozen=True)
class Case(Row):
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
    def given(self) -> dict[str, Any]:
        """What `apply_patch` is given."""
        return CASES[self.method](self.at)

    @property
    def merging(self) -> dict[str, Any]:
        settings = self.given
        ratio = settings.pop("ratio")
        merging = asdict(diffusion_settings(self.at, None, settings))
        if isinstance(ratio, RatioSchedule):
            ratio = [list(piece) for piece in ratio.pieces]
        return merging | {"ratio": ratio}

    def patched(self, pipe: Any):
        return tomesd.patched(pipe, **self.given)


def figures(run: Run, case: Case, scenes: Sequence[Scene]) -> dict[str, Any]:
    """A case's pictures beside the unpatched ones, which are the run's first row.

    >>> figures(run, Case("whole blocks", at=0.5), scenes)["psnr"]

    Raises OSError for a picture that is not there or broken.
    """
    images, unpatched = (read(run, row) for row in (case, run.rows[0]))
    return {
        "case": case.method,
        "ratio": case.at,
        "merging": case.merging,
        "psnr": float(np.mean(list(map(psnr, images, unpatched)))),
        "right": sum(shown_right(images, scenes)),
    }


def read(run: Run, row: Row) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in run.paths(row)]


def joined(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict]:
    """The rows, and those of earlier runs that are not among them and still merge by the same.

    >>> joined(json.loads(file.read_text())["rows"], rows)
    """
    measured = {(row["case"], row["ratio"]) for row in rows}
    kept = [
        row
        for row in before
        if (row["case"], row["ratio"]) not in measured
        and row["case"] in CASES
        and row["merging"] == Case(row["case"], at=row["ratio"]).merging
    ]
    order = list(CASES)
    return sorted([*kept, *rows], key=lambda row: (order.index(row["case"]), row["ratio"]))


def run_folder(root: Path, settings: Mapping[str, Any]) -> Path:
    """A folder of its own for these settings: other settings never mix with what it holds.

    >>> folder = run_folder(Path("runs/quality"), {"steps": 25, **versions("torch")})

    settings: everything that the folder's contents depend on; its settings.json says it.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:12]
    file = folder / "settings.json"
    if not file.exists():
        with atomic_write(file) as partial:
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
