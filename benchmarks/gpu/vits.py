"""Vision Transformers: pictures per second, unpatched, patched, and facebookresearch/ToMe's."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import tomesd
from benchmarks.common.timing import Spread, interleave, round_ratio, seconds
from benchmarks.gpu.context import Case, Context, Row

# Model of timm, r, side of the picture.
RUNS = (
    ("vit_base_patch16_224", 16, 224),
    ("vit_large_patch16_224", 8, 224),
    ("vit_base_patch16_384", 32, 384),
    ("vit_large_patch16_384", 16, 384),
)
PEER = "facebookresearch/ToMe"


def cases(context: Context) -> Sequence[Case]:
    runs = [("vit_tiny_patch16_224", 8, 64)] if context.quick else RUNS
    return [
        Case(f"{name}, r = {r}, {side} px", partial(throughput, context, name, r, side), 15)
        for name, r, side in runs
    ]


def throughput(context: Context, name: str, r: int, side: int) -> Row:
    """Pictures per second of a batch, in interleaved rounds."""
    import timm

    batch = 2 if context.quick else 64
    x = context.noise(batch, 3, side, side)

    def build() -> Any:
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=side).eval().requires_grad_(False)
        return model.to(context.device, context.dtype)

    models = {"unpatched": build(), "patched": tomesd.apply_patch(build(), r=r)}
    found: Row = {}
    if "tome" in context.peers:
        try:
            models[PEER] = _peer(context, build(), r)
            models[PEER](x)
        except Exception as error:  # It was written for timm 0.4.
            models.pop(PEER, None)
            found[PEER] = {"error": f"{type(error).__name__}: {error}"}
    runs: dict[str, Callable[[], float]] = {}
    with torch.no_grad():
        for variant, model in models.items():
            model(x)
            runs[variant] = partial(seconds, partial(model, x), context.device)
        times = interleave(runs, context.rounds)
    for variant, own in times.items():
        found[variant] = {
            "pictures per second": asdict(Spread.of([batch / each for each in own])),
            "times as fast": asdict(round_ratio(times["unpatched"], own)),
        }
    return found


def _peer(context: Context, model: Any, r: int) -> Any:
    folder = str(context.peers["tome"])
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.import_module("tome").patch.timm(model)
    model.r = r
    return model
