"""What a run of scripts/fid.py compares: its presets, and everything that it needs, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import digest
from benchmarks.fid.distances import Features
from benchmarks.pictures.picture_set import PictureSet, PipelineSpec
from benchmarks.pictures.reference import Reference

# The options that a preset sets. Paper: ToMe, Appendix F, whose partition allows at most 0.5.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "prompts": "imagenet",
        "num_images": 2000,
        "scheduler": "plms",
        "steps": 50,
        "guidance": 7.5,
        "size": (512, 512),
        "patch_preset": "paper",
        "features": "inception",
        "num_reference": 5000,
        "methods": ["prune:0.1,0.2", "tome:0.1,0.2,0.3,0.4,0.5"],
    },
    "quick": {
        "num_images": 64,
        "num_reference": 1000,
        "methods": ["prune:0.1", "tome:0.1,0.5"],
    },
}
METHODS = ["prune:0.1,0.2", "tome:0.1,0.2,0.3,0.4,0.5,0.6"]


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs, checked.

    rounds: how often each method is timed, 0 for no times and no memory.
    finds_limits: whether to search for the largest batch and picture. limit: the bytes that they
        may take; None for all of the device's.
    """

    pictures: PictureSet
    spec: PipelineSpec
    reference: Reference
    features: Features
    settings: Mapping[str, Any]
    rounds: int
    finds_limits: bool
    limit: int | None

    @property
    def device(self) -> torch.device:
        return torch.device(self.spec.device)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of every picture."""
        width, height = self.pictures.sampling.width, self.pictures.sampling.height
        assert width is not None
        assert height is not None
        return width, height

    @property
    def cache(self) -> Path:
        """Where the reference's features are kept, for runs with other settings too."""
        return self.pictures.folder.parent / "reference"

    @property
    def reference_name(self) -> str:
        return cache_name(self.reference, self.size, self.features)


def cache_name(reference: Reference, size: tuple[int, int], features: Features) -> str:
    """A name for the reference's cached features: another size or other weights change it.

    >>> cache_name(drawn(1000), (128, 128), Features("shapes"))
    'shapes-1000-128x128-shapes-8c0d9a3b5e21'
    """
    width, height = size
    return f"{reference.name}-{width}x{height}-{features.name}-{digest(features.source)}"
