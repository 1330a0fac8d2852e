"""How token merging changes the embedded pipeline's pictures: python scripts/quality.py

For each way to merge and each ratio, the same prompts and seeds as without merging: mean PSNR to
the unpatched picture, and how many pictures show all that the prompt asks for (shape, its color,
kind and color of the background), as the embedded classifier sees it. Pictures and figures are kept
under --output, apart for all that they depend on; the same command goes on where it was stopped,
and one with other cases or ratios adds its rows to results.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.classifier import classifiers
from benchmarks.common.arguments import number, run_script, script_parser
from benchmarks.common.files import check_folder, atomic_write
from benchmarks.fid import fid
from benchmarks.pictures.picture_set import UNPATCHED, Model, Row, Run, make
from benchmarks.pictures.sampling import EMBEDDED, check_model, choose, native_side
from benchmarks.quality import quality
from benchmarks.quality.cases import CASES, Case, held_out, run_folder, shown_right
from tomesd.shapes.pipeline import ASSETS

MODEL = Model(None, "cpu", torch.float32, None)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    scenes = held_out(args.num_images)
    cases = [Case(name, at=ratio) for name in args.cases for ratio in args.ratios]
    try:
        check_folder(args.output)
        check_model(None)
        classifiers.check_model(None)
        pipe = MODEL.load()
        run, told = prepare(args, pipe, [scene.prompt for scene in scenes], cases)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    try:
        make(pipe, run, PartialState(cpu=True))
        right = sum(shown_right(quality.read(run, run.rows[0]), scenes))
        print(f"unpatched: {right} of {len(scenes)} pictures are right")
        rows = [quality.figures(run, case, scenes) for case in tqdm(cases, desc="figures")]
        write(run.folder / "results.json", {"settings": told, "unpatched right": right}, rows)
    except (FloatingPointError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}\nWhat is done stays; the same command goes on.")
    print(table(rows, args.cases, args.ratios))
    print(f"\npictures and results.json: {run.folder}")


def prepare(
    args: argparse.Namespace, pipe: Any, prompts: list[str], cases: list[Case]
) -> tuple[Run, dict[str, Any]]:
    """What is made, and all that pictures and figures depend on."""
    size = native_side(pipe), native_side(pipe)
    how = choose(pipe, None, args.steps, args.guidance, size)
    told = fid.identity(MODEL, "fp32", prompts, how, args.batch, None)
    told |= {
        "classifier": fid.digest(ASSETS / "classifier"),
        "device_name": fid.device_name(torch.device(MODEL.device)),
        "threads": torch.get_num_threads(),
    }
    folder = run_folder(args.output, told)
    return Run(folder, [Row(UNPATCHED), *cases], prompts, how, args.batch), told


def write(file: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows, and those that the file has of other cases and ratios."""
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    with atomic_write(file) as partial:
        record = about | {"rows": quality.joined(before, rows)}
        partial.write_text(json.dumps(record, indent=1) + "\n")


def table(rows: list[dict[str, Any]], cases: list[str], ratios: list[float]) -> str:
    """Markdown: a line for each way to merge, a column for each ratio."""
    lines = [
        "| PSNR to unpatched, dB (pictures right) | " + " | ".join(f"{r:g}" for r in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    for name in cases:
        cells = [f"{r['psnr']:.1f} ({r['right']})" for r in rows if r["case"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.epilog = f"{parser.epilog} Cases: {'; '.join(CASES)}."
    add = parser.add_argument
    add("--num-images", type=number(int, 1, 10_000), default=64, help="in each row (%(default)s)")
    add("--steps", type=number(int, 1, 1000), default=EMBEDDED.steps, help="(%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=EMBEDDED.guidance, help="(%(default)g)")
    ratios = [0.1, 0.2, 0.3, 0.4, 0.5]
    add(
        "--ratios",
        type=number(float, 0, 0.75),
        nargs="*",
        default=ratios,
        help=f"none: the unpatched pictures alone ({' '.join(map(str, ratios))})",
    )
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="(all)")
    add("--batch", type=number(int, 1, 1024), default=8, help="pictures sampled at once (8)")
    add("--output", type=Path, default=Path("runs/quality"), help="folder (%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, goes_on=True)
