"""The command of scripts/first_token.py: how soon a vision-language model answers."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tqdm import tqdm

import tomesd
from benchmarks.common import markdown
from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.markdown import figure, spread
from benchmarks.common.timing import Spread, interleave, round_ratio, seconds
from tomesd.pictures.device import choose_device, cpu_name, device_name
from tomesd.pictures.files import versions

IMAGE = 1  # The token in whose places visual tokens go.

# CLIP ViT-B/16 as the tower, SmolLM2 135M as the language model; LLaVA reads the tower's hidden
# state before its last layer, without the class token.
TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
}
LANGUAGE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def build(size: int, tower: dict[str, int], language: dict[str, int]) -> Any:
    """LLaVA with random weights, whose speed is that of any others.

    >>> build(336, TOWER, LANGUAGE).config.vision_feature_layer
    -2
    """
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(image_size=size, **tower),
        text_config=hf.LlamaConfig(**language),
        image_token_index=IMAGE,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def placeholders(model: Any) -> int:
    """How many visual tokens a picture has in the prompt, patched or not."""
    vision, layer = model.config.vision_config, model.config.vision_feature_layer
    patches = int(vision.image_size // vision.patch_size) ** 2
    merging = [patch for _, patch in tomesd.api.patches_of(model).values()]
    if not merging or merging[0].settings.unmerge:
        return patches
    return int(tomesd.tokens_after(model, hidden_state=layer)) - 1


@torch.no_grad()
def first_token(model: Any, pixels: torch.Tensor, text: int) -> torch.Tensor:
    """One picture and so many tokens of text: the first token of the answer."""
    ids = [0, *[IMAGE] * placeholders(model), *range(2, text + 1)]
    prompt = torch.tensor([ids], device=pixels.device)
    token: torch.Tensor = model(
        input_ids=prompt, pixel_values=pixels, use_cache=True, logits_to_keep=1
    ).logits.argmax(-1)
    return token


def variants(values: list[int]) -> dict[str, dict[str, Any]]:
    """By name: the options of `apply_patch`, none for the unpatched model."""
    found: dict[str, dict[str, Any]] = {"unpatched": {}}
    for r in values:
        found[f"r = {r}"] = {"r": r}
        found[f"r = {r}, unmerge=False"] = {"r": r, "unmerge": False}
    return found


def measure(
    model: Any, pixels: torch.Tensor, values: list[int], text: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows with the visual tokens, the seconds and how many times as fast each variant is."""
    found = variants(values)

    def timed(options: dict[str, Any]) -> float:
        tomesd.apply_patch(model, **options) if options else tomesd.remove_patch(model)
        return seconds(partial(first_token, model, pixels, text), pixels.device)

    def tokens(options: dict[str, Any]) -> int:
        tomesd.apply_patch(model, **options) if options else tomesd.remove_patch(model)
        return placeholders(model)

    runs = {name: partial(timed, options) for name, options in found.items()}
    with tqdm(total=len(runs) * (rounds + 1), unit="prompt") as bar:
        interleave(runs, 1, bar.update)  # Warm up.
        times = interleave(runs, rounds, bar.update)
    return [
        {
            "name": name,
            "visual_tokens": tokens(options),
            "seconds": asdict(Spread.of(times[name])),
            "times_as_fast": asdict(round_ratio(times["unpatched"], times[name])),
        }
        for name, options in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    return markdown.table(
        ["", "visual tokens", "first token, times as fast"],
        [[row["name"], str(row["visual_tokens"]), spread(row["times_as_fast"], 2)] for row in rows],
    )


def prepare(args: Namespace) -> Namespace:
    check_folder(args.output)
    args.device = choose_device(args.device)
    return args


def run(args: Namespace) -> None:
    torch.manual_seed(0)
    model = build(args.size, TOWER, LANGUAGE).to(args.device)
    pixels = torch.randn(1, 3, args.size, args.size).to(args.device)
    rows = measure(model, pixels, args.r, args.text, args.rounds)
    record = {
        "command": args.command,
        "environment": {
            "cpu": cpu_name(),
            "accelerator": None if args.device.type == "cpu" else device_name(args.device),
            "threads": torch.get_num_threads(),
            **versions("torch", "transformers"),
        },
        "rows": rows,
    }
    write_json(args.output / "results.json", record)
    print(table(rows))
    print(f"unpatched: {figure(rows[0]['seconds']['median'], 2)} s")


def add_options(parser: ArgumentParser) -> None:
    whole = number(int, 1, 100_000)
    parser.add_argument("--size", type=whole, default=336, help="of the picture, in px (336)")
    parser.add_argument("--text", type=whole, default=32, help="tokens of text (32)")
    parser.add_argument("--r", type=whole, nargs="+", default=[16, 32], help="(16 32)")
    parser.add_argument("--rounds", type=whole, default=5, help="(5)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first available)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/first-token"), help="(%(default)s)"
    )


main = Command("first_token", add_options, prepare, run)
