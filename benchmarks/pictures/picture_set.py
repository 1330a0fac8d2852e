"""Sets of pictures: the same prompts and seeds with each method, in files that a rerun keeps."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

import tomesd
from benchmarks.common.files import digest
from benchmarks.pictures.reference import BrokenPictureError
from tomesd.diffusion.settings import METHODS, DiffusionSettings, diffusion_settings
from tomesd.pictures.files import save_image, versions
from tomesd.pictures.sampling import Sampling, embedded_folder, load_pipeline, sample

UNPATCHED = "unpatched"


@dataclass(frozen=True)
class PipelineSpec:
    """The arguments of `load_pipeline`, so that a child process can load the pipeline again.

    >>> pipe = PipelineSpec(None, "cpu", torch.float32, None).load()
    """

    name: str | None
    device: str
    dtype: torch.dtype
    scheduler: str | None

    def load(self) -> Any:
        """The pipeline without progress bars and without a safety checker, whose black pictures
        would count."""
        pipe = load_pipeline(self.name, self.device, self.dtype, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None
        return pipe


@dataclass(frozen=True)
class Method:
    """One way to merge with its settings, or none: a row of the table.

    >>> Method("tome", DiffusionSettings(ratio=0.5)).name
    'tome 0.5'
    """

    method: str
    settings: DiffusionSettings | None = None

    @property
    def ratio(self) -> Any:
        return self.settings.ratio if self.settings else 0.0

    @property
    def name(self) -> str:
        return f"{self.method} {self.ratio:g}" if self.settings else self.method

    @property
    def merging(self) -> dict[str, Any] | None:
        """All settings that its pictures depend on; None for unpatched ones."""
        return as_record(self.settings) if self.settings else None

    def patched(self, pipe: Any) -> AbstractContextManager[Any]:
        """The patched pipeline, for a `with` block."""
        settings = asdict(self.settings) if self.settings else {"ratio": 0.0}
        return tomesd.patched(pipe, **settings)


def as_record(settings: DiffusionSettings) -> dict[str, Any]:
    """Settings as JSON returns them, with lists in place of tuples.

    >>> as_record(DiffusionSettings(ratio=RatioSchedule.last(0.5, since=0.2)))["ratio"]
    {'pieces': [[0.2, 0.0], [1.0, 0.5]]}
    """
    return json.loads(json.dumps(asdict(settings)))


def parse_methods(texts: Sequence[str], preset: str | None) -> list[Method]:
    """The unpatched pipeline, then each method at each of its ratios.

    >>> [method.name for method in parse_methods(["prune:0.1", "tome:0.1,0.5"], None)]
    ['unpatched', 'prune 0.1', 'tome 0.1', 'tome 0.5']

    Raises ValueError for an unknown method, or a ratio that is no number or not allowed.
    """
    found = [Method(UNPATCHED)]
    for text in texts:
        method, _, ratios = text.partition(":")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        for ratio in ratios.split(","):
            try:
                value = float(ratio)
            except ValueError:
                raise ValueError(
                    f"methods must be like tome:0.1,0.5, with ratios, got {text!r}"
                ) from None
            if value == 0:
                raise ValueError(f"ratio 0 is unpatched, which is always included, got {text!r}")
            new = Method(method, diffusion_settings(value, preset, {"method": method}))
            if new in found:
                raise ValueError(f"methods must name each ratio once, got {new.name} twice")
            found.append(new)
    return found


def identity(
    spec: PipelineSpec,
    precision: str,
    prompts: Sequence[str],
    sampling: Sampling,
    batch: int,
    preset: str | None,
) -> dict[str, Any]:
    """Everything that a picture depends on but its method's own settings.

    >>> metadata = identity(spec, "fp32", prompts, Sampling(25, 4.0), batch=8, preset=None)
    """
    merging = asdict(diffusion_settings(0.0, preset, {}))
    return {
        "model": digest(embedded_folder(spec.name) or spec.name),
        "scheduler": spec.scheduler,
        "precision": precision,
        "device": torch.device(spec.device).type,
        "sampling": vars(sampling),
        "batch": batch,
        "images": len(prompts),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12],
        "merging": {name: merging[name] for name in merging if name not in ("ratio", "method")},
        "versions": versions("tomesd", "torch", "diffusers", "transformers"),
    }


@dataclass(frozen=True)
class PictureSet:
    """A picture of each prompt, seeded with its index, for each method.

    >>> pictures = PictureSet(Path("out"), methods, ["a red heart"], Sampling(25, 4.0), batch=8)
    >>> pictures.path(methods[0], 0)
    PosixPath('out/unpatched/00000.png')

    batch: how many prompts are sampled at once. The split into batches never depends on existing
        files or the number of processes, since a batch's shape affects its pictures' rounding.
    """

    folder: Path
    methods: list[Method]
    prompts: list[str]
    sampling: Sampling
    batch: int

    def path(self, method: Method, index: int) -> Path:
        return self.folder / method.name / f"{index:05}.png"

    def paths(self, method: Method) -> list[Path]:
        return [self.path(method, index) for index in range(len(self.prompts))]

    @property
    def batches(self) -> list[range]:
        count = len(self.prompts)
        return [range(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]

    def metadata(self, method: Method, index: int) -> dict[str, Any]:
        """The metadata in a picture's file."""
        return {
            "prompt": self.prompts[index],
            "seed": index,
            "method": method.method,
            "ratio": method.ratio,
            "merging": json.dumps(method.merging),
            **vars(self.sampling),
            "batch": self.batch,
        }

    def remove_partial_files(self) -> None:
        """Delete what a killed run left unfinished."""
        for partial in self.folder.glob("*/.*.partial"):
            partial.unlink(missing_ok=True)


def make_pictures(pipe: Any, pictures: PictureSet, state: PartialState) -> None:
    """Make all missing pictures; several processes share the batches of each method.

    >>> make_pictures(pipe, pictures, PartialState())

    A file that is broken or has other metadata is reported and made again.
    Raises FloatingPointError for a picture that overflowed and OSError where writing fails;
    finished pictures are kept.
    """
    todo = list(_missing(pictures, state))
    count = sum(len(indices) for _, _, indices in todo)
    with tqdm(
        total=count, desc="pictures", unit="picture", disable=not state.is_main_process
    ) as bar:
        for method in pictures.methods:
            with method.patched(pipe):
                for _, batch, missing in (task for task in todo if task[0] == method):
                    prompts = [pictures.prompts[index] for index in batch]
                    images = sample(pipe, prompts, list(batch), pictures.sampling, len(batch))
                    for index, image in zip(batch, images, strict=True):
                        if index in missing:
                            path = pictures.path(method, index)
                            save_image(image, path, pictures.metadata(method, index))
                    bar.set_postfix_str(method.name, refresh=False)
                    bar.update(len(missing))


def _missing(pictures: PictureSet, state: PartialState) -> Iterator[tuple[Method, range, set[int]]]:
    """This process's share of the batches in which a picture is missing, with their indices."""
    with state.split_between_processes(pictures.batches) as own:
        for method in pictures.methods:
            for batch in own:
                missing = {i for i in batch if not _exists(pictures, method, i)}
                if missing:
                    yield method, batch, missing


def _exists(pictures: PictureSet, method: Method, index: int) -> bool:
    path = pictures.path(method, index)
    if not path.exists():
        return False
    try:
        check_picture(path, pictures.metadata(method, index), pictures.sampling)
    except BrokenPictureError as error:
        print(f"{error}; making it again", file=sys.stderr)
        return False
    return True


def check_picture(path: Path, metadata: Mapping[str, Any], sampling: Sampling) -> None:
    """Raises BrokenPictureError unless the file is complete and has this metadata and size."""
    try:
        with Image.open(path) as image:
            image.load()
            text, size = getattr(image, "text", {}), image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenPictureError(f"{path} is broken: {error}") from error
    if size != (sampling.width, sampling.height):
        raise BrokenPictureError(f"{path} has another size, {size}")
    other = [name for name, value in metadata.items() if text.get(name) != str(value)]
    if other:
        raise BrokenPictureError(f"{path} is another picture: {', '.join(other)} differ")
