"""What scripts/fid.py measures: pictures for each method, then every figure of the table."""

import platform
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.common.files import read_json, write_json
from benchmarks.fid import memory_limits, speed_and_memory
from benchmarks.fid.distances import cache_reference, distances
from benchmarks.fid.perceptual import perceptual
from benchmarks.fid.plan import Plan
from benchmarks.pictures.differences import Perceptual, differences
from benchmarks.pictures.picture_set import Method, make_pictures
from benchmarks.pictures.reference import Pictures
from tomesd.pictures.device import device_name
from tomesd.pictures.files import versions


def prepare_and_make_pictures(plan: Plan, pipe: Any, state: PartialState) -> Perceptual | None:
    """The reference's features first, so that its errors show early; then all pictures.

    Returns the perceptual distance, or None if its weights cannot be downloaded.
    """
    distance = None
    if state.is_main_process:
        plan.pictures.remove_partial_files()
        pictures = plan.reference.of_size(plan.size)
        cache_reference(pictures, plan.features, plan.cache, plan.reference_name, plan.device)
        try:
            distance = perceptual(plan.features, plan.device)
        except OSError as error:
            print(f"LPIPS is skipped, its weights cannot be downloaded: {error}", file=sys.stderr)
    state.wait_for_everyone()
    make_pictures(pipe, plan.pictures, state)
    state.wait_for_everyone()
    return distance


def measure(plan: Plan, pipe: Any, distance: Perceptual | None) -> dict[str, Any]:
    """Every figure of the table, by method, with everything that it depends on.

    Times, memory and limits are kept in the folder and not measured again.
    Raises BrokenPictureError for a picture that broke since it was made.
    """
    rows = [
        {
            "name": method.name,
            "method": method.method,
            "ratio": method.ratio,
            **measure_quality(plan, method, distance),
        }
        for method in tqdm(plan.pictures.methods, desc="distances", unit="row")
    ]
    for figures in (measure_speed(plan, pipe), find_limits(plan)):
        for row in rows:
            row |= figures.get(row["name"], {})
    return {"settings": dict(plan.settings), "environment": environment(plan), "rows": rows}


def measure_quality(plan: Plan, method: Method, distance: Perceptual | None) -> dict[str, Any]:
    """A method's pictures compared with the reference and with the unpatched ones."""
    paths = plan.pictures.paths(method)
    figures: dict[str, Any] = distances(
        Pictures(paths, plan.size),
        plan.reference.of_size(plan.size),
        plan.features,
        plan.cache,
        plan.reference_name,
        plan.device,
    )
    if method.settings is None:
        return figures
    unpatched = plan.pictures.paths(plan.pictures.methods[0])
    return figures | differences(paths, unpatched, distance, plan.device)


def measure_speed(plan: Plan, pipe: Any) -> dict[str, dict[str, Any]]:
    """Seconds per picture (the median over rounds) and peak memory in bytes, by method."""
    if not plan.rounds:
        return {}
    names = {method.name for method in plan.pictures.methods}
    depends_on = {
        "rounds": plan.rounds,
        "device": device_name(plan.device),
        "threads": torch.get_num_threads(),
    }
    file = plan.pictures.folder / "speed.json"
    found = _read_rows(file, depends_on)
    # Rounds are interleaved, so a new method means that all are measured again.
    if not names <= found.keys():
        found = speed_and_memory.measure(pipe, plan.pictures, plan.spec, plan.rounds)
        _write_rows(file, depends_on, found)
    return {
        name: {"seconds": median(found[name]["seconds"]), "memory": found[name]["memory"]}
        for name in names
    }


def find_limits(plan: Plan) -> dict[str, dict[str, Any]]:
    """The largest batch and the largest side in pixels, and why not larger, by method."""
    if not plan.finds_limits:
        return {}
    depends_on = {"limit": plan.limit, "device": device_name(plan.device)}
    file = plan.pictures.folder / "limits.json"
    found = _read_rows(file, depends_on)
    guidance = plan.pictures.sampling.guidance
    with memory_limits.Prober(plan.spec, plan.limit) as prober:
        for method in tqdm(plan.pictures.methods, desc="limits", unit="row"):
            if method.name not in found:
                batch, side = prober.find(method.settings, plan.size[0], guidance)
                found[method.name] = {
                    "largest_batch": batch.value,
                    "largest_batch_reason": batch.reason,
                    "largest_side": side.value,
                    "largest_side_reason": side.reason,
                }
                _write_rows(file, depends_on, found)
    return found


def _read_rows(file: Path, depends_on: dict[str, Any]) -> dict[str, dict[str, Any]]:
    record = read_json(file) or {}
    return record["rows"] if record.get("depends_on") == depends_on else {}


def _write_rows(file: Path, depends_on: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    write_json(file, {"depends_on": depends_on, "rows": rows})


def environment(plan: Plan) -> dict[str, Any]:
    """The device, threads, processes and versions that the figures depend on."""
    return {
        "device": str(plan.device),
        "device_name": device_name(plan.device),
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions(
            "tomesd", "torch", "diffusers", "transformers", "torch-fidelity", "scikit-image"
        ),
    }
