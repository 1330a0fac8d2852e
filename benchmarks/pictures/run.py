"""Many pictures by many settings, each written whole under its own name, so that a run goes on."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

import tomesd
from benchmarks.common.files import save_image
from benchmarks.pictures.reference import BrokenPictureError
from benchmarks.pictures.sampling import Sampling, load_pipeline, sample
from tomesd.diffusion.settings import METHODS, DiffusionSettings, diffusion_settings

UNPATCHED = "unpatched"


@dataclass(frozen=True)
class Model:
    """What pictures are made with, as `load_pipeline` takes it; a child process loads it anew."""

    name: str | None
    device: str
    dtype: torch.dtype
    scheduler: str | None

    def load(self) -> Any:
        """The pipeline, silent, and without a safety checker, whose black pictures would count."""
        pipe = load_pipeline(self.name, self.device, self.dtype, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None
        return pipe


@dataclass(frozen=True)
class Row:
    """A line of the table: one way to merge, or none at all.

    >>> Row("tome", DiffusionSettings(ratio=0.5)).name
    'tome 0.5'
    """

    method: str
    settings: DiffusionSettings | None = None

    @property
    def ratio(self) -> float:
        return self.settings.ratio if self.settings else 0.0

    @property
    def name(self) -> str:
        return f"{self.method} {self.ratio:g}" if self.settings else self.method

    @property
    def merging(self) -> dict[str, Any] | None:
        """All that its pictures' tokens merge by; None for not at all."""
        return asdict(self.settings) if self.settings else None

    def patched(self, pipe: Any):
        """The pipeline with this row's merging, for a `with` block."""
        settings = asdict(self.settings) if self.settings else {"ratio": 0.0}
        return tomesd.patched(pipe, **settings)


def rows(methods: Sequence[str], preset: str | None) -> list[Row]:
    """The unpatched row, then one for each method and ratio.

    >>> [row.name for row in rows(["prune:0.1", "tome:0.1,0.5"], None)]
    ['unpatched', 'prune 0.1', 'tome 0.1', 'tome 0.5']

    Raises ValueError for an unknown method, or a ratio that is none or that the method cannot have.
    """
    found = [Row(UNPATCHED)]
    for text in methods:
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
                raise ValueError(f"ratio 0 is the unpatched row, which is always there: {text!r}")
            row = Row(method, diffusion_settings(value, preset, {"method": method}))
            if row in found:
                raise ValueError(f"methods must name each ratio once, got {row.name} twice")
            found.append(row)
    return found


@dataclass(frozen=True)
class Run:
    """What is made: a picture of each prompt, seeded with its index, for each row.

    batch: as many prompts are sampled at once. Which ones are sampled together never depends on
        what is there already or on the number of processes, since the shape of a batch touches the
        rounding of its pictures.
    """

    folder: Path
    rows: list[Row]
    prompts: list[str]
    sampling: Sampling
    batch: int

    def path(self, row: Row, index: int) -> Path:
        return self.folder / row.name / f"{index:05}.png"

    def paths(self, row: Row) -> list[Path]:
        return [self.path(row, index) for index in range(len(self.prompts))]

    @property
    def batches(self) -> list[range]:
        count = len(self.prompts)
        return [range(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]

    def about(self, row: Row, index: int) -> dict[str, Any]:
        """What a picture's file says of itself."""
        return {
            "prompt": self.prompts[index],
            "seed": index,
            "method": row.method,
            "ratio": row.ratio,
            "merging": json.dumps(row.merging),
            **vars(self.sampling),
            "batch": self.batch,
        }


def make(pipe: Any, run: Run, state: PartialState) -> None:
    """Make all pictures that are not there yet; with several processes, each its share of a row.

    >>> make(pipe, Run(Path("out"), rows(["tome:0.5"], None), prompts, sampling, 8), PartialState())

    A file that is broken, or says that it is another picture, is reported and made again.
    Raises FloatingPointError for a picture that overflowed and OSError where writing fails; what
    is there stays.
    """
    todo = list(_missing(run, state))
    count = sum(len(indices) for _, _, indices in todo)
    with tqdm(
        total=count, desc="pictures", unit="picture", disable=not state.is_main_process
    ) as bar:
        for row in run.rows:
            with row.patched(pipe):
                for _, together, missing in (task for task in todo if task[0] == row):
                    prompts = [run.prompts[index] for index in together]
                    images = sample(pipe, prompts, list(together), run.sampling, len(together))
                    for index, image in zip(together, images, strict=True):
                        if index in missing:
                            save_image(image, run.path(row, index), run.about(row, index))
                    bar.set_postfix_str(row.name, refresh=False)
                    bar.update(len(missing))


def _missing(run: Run, state: PartialState) -> Iterator[tuple[Row, range, set[int]]]:
    """This process's share: the batches in which a picture is missing, and which ones those are."""
    with state.split_between_processes(run.batches) as mine:
        for row in run.rows:
            for together in mine:
                missing = {i for i in together if not _is_there(run, row, i)}
                if missing:
                    yield row, together, missing


def _is_there(run: Run, row: Row, index: int) -> bool:
    path = run.path(row, index)
    if not path.exists():
        return False
    try:
        check(path, run.about(row, index), run.sampling)
    except BrokenPictureError as error:
        print(f"{error}; it is made again", file=sys.stderr)
        return False
    return True


def check(path: Path, about: Mapping[str, Any], sampling: Sampling) -> None:
    """Raises BrokenPictureError unless the file is this picture, whole."""
    try:
        with Image.open(path) as image:
            image.load()
            text, size = getattr(image, "text", {}), image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenPictureError(f"{path} is broken: {error}") from error
    if size != (sampling.width, sampling.height):
        raise BrokenPictureError(f"{path} is of another size, {size}")
    other = [name for name, value in about.items() if text.get(name) != str(value)]
    if other:
        raise BrokenPictureError(f"{path} is another picture: {', '.join(other)} differ")
