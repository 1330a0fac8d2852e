"""What `scripts/fid.py` does: pictures for each row, then every figure of the table."""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.common.files import versions, atomic_write
from benchmarks.fid import limits, speed
from benchmarks.fid.distances import Features, cache_reference, distances
from benchmarks.pictures.differences import Perceptual, changes, perceptual
from benchmarks.pictures.reference import FEWEST, Pictures, Reference
from benchmarks.pictures.picture_set import Model, Row, Run, make
from benchmarks.pictures.sampling import Sampling
from benchmarks.quality.cases import held_out
from benchmarks.speed.forwards import cpu_name
from tomesd.diffusion.settings import diffusion_settings
from tomesd.shapes.pipeline import ASSETS

# What each preset stands for. Paper: ToMe, Appendix F, whose partition allows at most 0.5.
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
    """All that a run needs, checked. limit: bytes; None for all that there are."""

    run: Run
    model: Model
    reference: Reference
    features: Features
    settings: Mapping[str, Any]
    rounds: int
    finds_limits: bool
    limit: int | None

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of every picture."""
        width, height = self.run.sampling.width, self.run.sampling.height
        assert width is not None
        assert height is not None
        return width, height

    @property
    def cache(self) -> Path:
        """Where the reference's features are kept, for runs with other settings too."""
        return self.run.folder.parent / "reference"

    @property
    def reference_name(self) -> str:
        """Also tells its size, and which weights its features come from."""
        width, height = self.size
        features = f"{self.features.name}-{digest(self.features.source)}"
        return f"{self.reference.name}-{width}x{height}-{features}"


def prompts(source: str, count: int | None) -> list[str]:
    """So many prompts, in turns: of Shapes scenes, of ImageNet's classes, or the lines of a file.

    >>> prompts("imagenet", 2)
    ['A high quality photograph of a tench.', 'A high quality photograph of a goldfish.']

    source: "shapes", "imagenet" (ToMe, Appendix F) or a file. count: None for 1,000 of the Shapes
        world, or each of the others once.
    Raises FileNotFoundError, or ValueError for a file that is empty or has empty lines, and for
    fewer prompts than the statistics need.
    """
    if source == "shapes":
        found = [scene.prompt for scene in held_out(1000 if count is None else count)]
    elif source == "imagenet":
        # Names from the metadata; no weights are loaded.
        from torchvision.models import ResNet50_Weights

        names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
        found = [f"A high quality photograph of a {name}." for name in names]
    else:
        found = _lines(Path(source))
    found = [found[index % len(found)] for index in range(count or len(found))]
    if len(found) < FEWEST:
        raise ValueError(
            f"num-images must be {FEWEST} or more for the statistics, got {len(found)}"
        )
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts must be shapes, imagenet or a file, got {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts must be UTF-8 text, got {str(path)!r}: {error}") from error
    empty = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {', '.join(empty)}" if empty else "all of it"
        raise ValueError(f"prompts must have no empty lines, got {str(path)!r}: {where} is empty")
    return lines


def digest(path: Path | str | None) -> str:
    """A name for what a file or folder holds; a hub id is its own, as is None."""
    if path is None or not Path(path).exists():
        return str(path)
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(f"{file.relative_to(path)}\0".encode())
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:12]


def identity(
    model: Model,
    precision: str,
    prompts: Sequence[str],
    sampling: Sampling,
    batch: int,
    preset: str | None,
) -> dict[str, Any]:
    """All that a picture depends on. With anything of it changed, a run gets a new folder."""
    merging = asdict(diffusion_settings(0.0, preset, {}))
    return {
        "model": digest(model.name or ASSETS / "pipeline"),
        "scheduler": model.scheduler,
        "precision": precision,
        "device": torch.device(model.device).type,
        "sampling": vars(sampling),
        "batch": batch,
        "images": len(prompts),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12],
        "merging": {name: merging[name] for name in merging if name not in ("ratio", "method")},
        "versions": versions("tomesd", "torch", "diffusers", "transformers"),
    }


def make_pictures(plan: Plan, pipe: Any, state: PartialState) -> Perceptual | None:
    """The reference's features first, where what is wrong shows; then all pictures.

    Returns the perceptual distance, or None if its weights cannot be downloaded.
    """
    distance = None
    if state.is_main_process:
        for partial in plan.run.folder.glob("*/.*.partial"):  # of a run that was killed
            partial.unlink(missing_ok=True)
        pictures = plan.reference.of_size(plan.size)
        cache_reference(pictures, plan.features, plan.cache, plan.reference_name, plan.device)
        try:
            distance = perceptual(plan.features, plan.device)
        except OSError as error:
            print(f"LPIPS is left out, its weights cannot be had: {error}", file=sys.stderr)
    state.wait_for_everyone()
    make(pipe, plan.run, state)
    state.wait_for_everyone()
    return distance


def measure(plan: Plan, pipe: Any, distance: Perceptual | None) -> dict[str, Any]:
    """Every figure of the table, by row, with all that they depend on.

    Times, memory and limits are kept in the folder as they are measured, and not measured again.
    Raises BrokenPictureError for a picture that broke since it was made: nothing is averaged then.
    """
    found = [
        {"name": row.name, "method": row.method, "ratio": row.ratio, **compare(plan, row, distance)}
        for row in tqdm(plan.run.rows, desc="distances", unit="row")
    ]
    for figures in (speeds(plan, pipe), largest(plan)):
        for record in found:
            record |= figures.get(record["name"], {})
    return {"settings": dict(plan.settings), "environment": environment(plan), "rows": found}


def compare(plan: Plan, row: Row, distance: Perceptual | None) -> dict[str, Any]:
    """A row's pictures against the reference and against the unpatched ones."""
    paths, unpatched = plan.run.paths(row), plan.run.paths(plan.run.rows[0])
    figures: dict[str, Any] = distances(
        Pictures(paths, plan.size),
        plan.reference.of_size(plan.size),
        plan.features,
        plan.cache,
        plan.reference_name,
        plan.device,
    )
    if row.settings is None:
        return figures
    return figures | changes(paths, unpatched, distance, plan.device)


def speeds(plan: Plan, pipe: Any) -> dict[str, dict[str, Any]]:
    """Seconds for one picture (the median over rounds) and peak memory in bytes, by row."""
    if not plan.rounds:
        return {}
    names = {row.name for row in plan.run.rows}
    about = {
        "rounds": plan.rounds,
        "device": device_name(plan.device),
        "threads": torch.get_num_threads(),
    }
    file = plan.run.folder / "speed.json"
    found = _remembered(file, about)
    # All rows take turns, so a new row means that all are measured.
    if not names <= found.keys():
        found = speed.measure(pipe, plan.run, plan.model, plan.rounds)
        _remember(file, about, found)
    return {
        name: {"seconds": median(found[name]["seconds"]), "memory": found[name]["memory"]}
        for name in names
    }


def largest(plan: Plan) -> dict[str, dict[str, Any]]:
    """The largest batch and the largest side in pixels, and why no larger ones, by row."""
    if not plan.finds_limits:
        return {}
    about = {"limit": plan.limit, "device": device_name(plan.device)}
    file = plan.run.folder / "limits.json"
    found = _remembered(file, about)
    with limits.Prober(plan.model, plan.limit) as prober:
        for row in tqdm(plan.run.rows, desc="limits", unit="row"):
            if row.name not in found:
                batch, side = prober.find(row.settings, plan.size[0], plan.run.sampling.guidance)
                found[row.name] = {
                    "largest_batch": batch.value,
                    "largest_batch_reason": batch.reason,
                    "largest_side": side.value,
                    "largest_side_reason": side.reason,
                }
                _remember(file, about, found)
    return found


def _remembered(file: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    record = json.loads(file.read_text()) if file.exists() else {}
    return record["rows"] if record.get("about") == about else {}


def _remember(file: Path, about: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    with atomic_write(file) as partial:
        partial.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def environment(plan: Plan) -> dict[str, Any]:
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
