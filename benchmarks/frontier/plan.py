"""What scripts/frontier.py needs, checked, and the files that keep the results of both halves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import read_json
from benchmarks.fid.distances import Features
from benchmarks.frontier.candidates import Candidate
from benchmarks.pictures.picture_set import PictureSet, PipelineSpec, as_record
from benchmarks.pictures.reference import Reference
from benchmarks.speed.setup import Setup, environment
from tomesd.pictures.device import device_name
from tomesd.pictures.files import versions

FEATURES = Features("shapes")


@dataclass(frozen=True)
class Plan:
    """Everything that both halves need, checked.

    pipeline: the folder of the pipeline that makes the pictures; small: its denoiser. large: the
    denoiser that is timed. metadata: what the pictures depend on.
    """

    folder: Path
    candidates: list[Candidate]
    pictures: PictureSet
    spec: PipelineSpec
    pipeline: Path
    reference: Reference
    metadata: Mapping[str, Any]
    small: Setup
    large: Setup


def quality_dependencies(
    metadata: Mapping[str, Any], device: torch.device, reference: str
) -> dict[str, Any]:
    """Everything that quality.json depends on but the candidates, as JSON returns it."""
    found = {
        **metadata,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        **versions("torch-fidelity", "scikit-image"),
        "reference": reference,
    }
    return json.loads(json.dumps(found))


def speed_dependencies(setup: Setup) -> dict[str, Any]:
    """Everything that speed.json depends on but the candidates, as JSON returns it."""
    found = {"model": setup.denoiser.name, "size": setup.sizes[0], **environment(setup)}
    del found["rounds"], found["peer"]
    return json.loads(json.dumps(found))


def check_same_dependencies(file: Path, depends_on: Mapping[str, Any]) -> None:
    """Raises ValueError if the file has results that must not be mixed with these.

    >>> check_same_dependencies(folder / "speed.json", speed_dependencies(setup))
    """
    record = read_json(file)
    if record is None or record["depends_on"] == depends_on:
        return
    earlier = record["depends_on"]
    names = [*depends_on, *(name for name in earlier if name not in depends_on)]
    differ = [
        f"{name}={earlier.get(name)!r} in it, {depends_on.get(name)!r} now"
        for name in names
        if earlier.get(name) != depends_on.get(name)
    ]
    raise ValueError(
        f"output must be another folder, or {file} deleted: its results are from "
        f"{'; '.join(differ)}"
    )


def merging(candidates: list[Candidate]) -> dict[str, Any]:
    """How each candidate merges, by name, as JSON returns it.

    >>> merging(chosen(["grid 2x2"], with_peer=False))["grid 2x2"]["matcher"]
    'GridMatcher'
    """
    return {
        each.name: {
            "family": each.family,
            "matcher": each.matcher.__name__ if each.matcher else None,
            "settings": as_record(each.settings),
            **({"cache": each.name} if each.cache else {}),
        }
        if each.settings
        else None
        for each in candidates
    }
