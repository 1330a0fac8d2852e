"""How token merging changes the embedded pipeline's pictures: python scripts/quality.py

For each way to merge and each ratio, the same prompts and seeds as without merging: mean PSNR to
the unpatched picture, and how many pictures show all that the prompt asks for (shape, its color,
kind and color of the background), as the embedded classifier sees it. Pictures are kept under
--out; the same command goes on where it was stopped.
"""

import json
from pathlib import Path

import numpy as np

from tomesd.evaluation import arguments
from tomesd.evaluation.image_file import versions, whole
from tomesd.evaluation.quality import CASES, held_out, pictures, psnr, run_folder, shown_right
from tomesd.evaluation.sampling import EMBEDDED, Sampling, check_model, load_pipeline


def main() -> None:
    parser = arguments.script_parser(__doc__)
    parser.epilog = f"Cases: {'; '.join(CASES)}."
    number = arguments.number
    parser.add_argument("--num-images", type=number(int, 1, 10_000), default=64)
    parser.add_argument("--steps", type=number(int, 1, 1000), default=EMBEDDED.steps)
    parser.add_argument("--guidance", type=number(float, 0, 100), default=EMBEDDED.guidance)
    parser.add_argument(
        "--ratios", type=number(float, 0, 0.75), nargs="*", default=[0.1, 0.2, 0.3, 0.4, 0.5]
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--batch", type=number(int, 1, 1024), default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    try:
        check_model(None)
    except FileNotFoundError as error:
        parser.error(str(error))

    sampling = Sampling(args.steps, args.guidance)
    folder = run_folder(args.out, vars(sampling))
    scenes = held_out(args.num_images)
    prompts = [scene.prompt for scene in scenes]
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def make(place: str, settings: dict) -> list:
        return pictures(pipe, prompts, sampling, folder / place, settings, args.batch)

    unpatched = make("unpatched", {"ratio": 0.0})
    results = {
        "sampling": vars(sampling),
        "images": args.num_images,
        "unpatched right": sum(shown_right(unpatched, scenes)),
        "versions": versions("torch", "diffusers", "transformers"),
        "rows": [],
    }
    print(f"unpatched: {results['unpatched right']} of {args.num_images} pictures are right")
    for name in args.cases:
        for ratio in args.ratios:
            images = make(f"{name} {ratio:g}", CASES[name](ratio))
            row = {
                "case": name,
                "ratio": ratio,
                "psnr": float(np.mean(list(map(psnr, images, unpatched)))),
                "right": sum(shown_right(images, scenes)),
            }
            results["rows"].append(row)
    with whole(folder / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["rows"], args.cases, args.ratios))
    print(f"\npictures and results.json: {folder}")


def table(rows: list[dict], cases: list[str], ratios: list[float]) -> str:
    """Markdown: a line for each way to merge, a column for each ratio."""
    lines = [
        "| PSNR to unpatched, dB (pictures right) | " + " | ".join(f"{r:g}" for r in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    for name in cases:
        cells = [f"{r['psnr']:.1f} ({r['right']})" for r in rows if r["case"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
