"""The command of scripts/quality.py: PSNR and correctness of each case at each ratio."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.common import markdown
from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder, digest, read_json, settings_folder, write_json
from benchmarks.pictures.picture_set import (
    UNPATCHED,
    Method,
    PictureSet,
    PipelineSpec,
    identity,
    make_pictures,
)
from benchmarks.pictures.prompts import held_out
from benchmarks.quality.cases import CASES, Case, correct, load, measure_case, merge_rows
from tomesd.pictures import classifiers
from tomesd.pictures.device import device_name
from tomesd.pictures.sampling import EMBEDDED, check_model, choose, native_side
from tomesd.shapes.names import ASSETS
from tomesd.shapes.world import Scene

SPEC = PipelineSpec(None, "cpu", torch.float32, None)
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5]


@dataclass(frozen=True)
class Job:
    """The pictures to make, their scenes and cases, and what they depend on."""

    args: Namespace
    pipe: Any
    scenes: list[Scene]
    cases: list[Case]
    pictures: PictureSet
    metadata: dict[str, Any]


def prepare(args: Namespace) -> Job:
    """Check the arguments and load the pipeline."""
    scenes = held_out(args.num_images)
    cases = [Case(name, at=ratio) for name in args.cases for ratio in args.ratios]
    prompts = [scene.prompt for scene in scenes]
    check_folder(args.output)
    check_model(None)
    classifiers.check_model(None)
    pipe = SPEC.load()
    size = native_side(pipe), native_side(pipe)
    sampling = choose(pipe, None, args.steps, args.guidance, size)
    metadata = identity(SPEC, "fp32", prompts, sampling, args.batch, None) | {
        "classifier": digest(ASSETS / "classifier"),
        "device_name": device_name(torch.device(SPEC.device)),
        "threads": torch.get_num_threads(),
    }
    folder = settings_folder(args.output, metadata)
    pictures = PictureSet(folder, [Method(UNPATCHED), *cases], prompts, sampling, args.batch)
    return Job(args, pipe, scenes, cases, pictures, metadata)


def run(job: Job) -> None:
    """Make the pictures, measure each case, and add its row to results.json."""
    pictures = job.pictures
    make_pictures(job.pipe, pictures, PartialState(cpu=True))
    right = sum(correct(load(pictures, pictures.methods[0]), job.scenes))
    print(f"unpatched: {right} of {len(job.scenes)} pictures are correct")
    rows = [measure_case(pictures, case, job.scenes) for case in tqdm(job.cases, desc="cases")]
    file = pictures.folder / "results.json"
    earlier = (read_json(file) or {"rows": []})["rows"]
    record = {
        "command": job.args.command,
        "settings": job.metadata,
        "unpatched right": right,
        "rows": merge_rows(earlier, rows),
    }
    write_json(file, record)
    print(table(rows, job.args.cases, job.args.ratios))
    print(f"\npictures and results.json: {pictures.folder}")


def table(rows: list[dict[str, Any]], cases: list[str], ratios: list[float]) -> str:
    """Markdown: a row for each case, a column for each ratio."""
    return markdown.table(
        ["PSNR to unpatched, dB (correct pictures)", *(f"{ratio:g}" for ratio in ratios)],
        [
            [name, *(f"{r['psnr']:.1f} ({r['right']})" for r in rows if r["case"] == name)]
            for name in cases
        ],
    )


def add_options(parser: ArgumentParser) -> None:
    parser.epilog = f"{parser.epilog} Cases: {'; '.join(CASES)}."
    add = parser.add_argument
    add("--num-images", type=number(int, 1, 10_000), default=64, help="in each row (%(default)s)")
    add("--steps", type=number(int, 1, 1000), default=EMBEDDED.steps, help="(%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=EMBEDDED.guidance, help="(%(default)g)")
    add(
        "--ratios",
        type=number(float, 0, 0.75),
        nargs="*",
        default=RATIOS,
        help=f"none: only the unpatched images ({' '.join(map(str, RATIOS))})",
    )
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="(all)")
    add("--batch", type=number(int, 1, 1024), default=8, help="images sampled at once (8)")
    add("--output", type=Path, default=Path("runs/quality"), help="folder (%(default)s)")


main = Command("quality", add_options, prepare, run, resumes=True)
