"""What `generate` and `compare` share: a loaded pipeline, how it samples, and what a file says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tomesd.diffusion.settings import DiffusionSettings
from tomesd.pictures import sampling
from tomesd.pictures.device import PRECISIONS, choose_device, choose_precision
from tomesd.pictures.files import check_output, versions
from tomesd.pictures.sampling import Sampling
from tomesd.shapes.names import DEFAULT


@dataclass(frozen=True)
class Job:
    """A pipeline and how it samples."""

    pipe: Any
    model: str | None
    sampling: Sampling
    device: str
    precision: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The settings that the file of every image has."""
        return {
            "model": self.model or DEFAULT,
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "scheduler": type(self.pipe.scheduler).__name__,
            "device": self.device,
            "precision": self.precision,
            **versions("tomesd", "torch", "diffusers"),
        }


def load(given: Mapping[str, Any], from_image: bool = False) -> Job:
    """The job of these options; what is known to be wrong is raised before anything is loaded.

    >>> job = load({"model": None, "steps": 2, "output": Path("runs")} | dict.fromkeys(
    ...     ("device", "precision", "scheduler", "guidance", "size")))
    >>> job.sampling.steps
    2

    Raises as `load_pipeline` does.
    """
    device = choose_device(given["device"])
    precision = given["precision"] or choose_precision(device)
    output: Path = given["output"]
    check_output(output)
    sampling.check_model(given["model"])
    pipe = sampling.load_pipeline(
        given["model"], device, PRECISIONS[precision], given["scheduler"], from_image
    )
    how = sampling.choose(pipe, given["model"], given["steps"], given["guidance"], given["size"])
    return Job(pipe, given["model"], how, str(device), precision)


def size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def as_text(settings: DiffusionSettings) -> str:
    """Settings as JSON, for the metadata of a file."""
    return json.dumps(vars(settings), default=vars)
