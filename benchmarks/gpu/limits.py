"""The largest batch at 512 px and the largest picture that a forward of SD1.5 fits."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import tomesd
from benchmarks.common.memory import first_line, ran_out
from benchmarks.fid.memory_limits import largest
from benchmarks.gpu.context import Case, Context, Row
from benchmarks.models.unets import Denoiser

VARIANTS: dict[str, Callable[[Any], object]] = {
    "unpatched": lambda model: None,
    "default": lambda model: tomesd.apply_patch(model),
    "fast": lambda model: tomesd.apply_patch(model, preset="fast"),
}


def cases(context: Context) -> Sequence[Case]:
    return [Case(name, partial(limits, context, name), 60) for name in VARIANTS]


def limits(context: Context, variant: str) -> Row:
    """By bisection; sides in steps of 512 px."""
    model, denoiser = context.build("sd15")
    VARIANTS[variant](model)
    most = 2 if context.quick else 512
    unit = 8 * denoiser.pixels if context.quick else 512
    batch = largest(partial(_fits, context, model, denoiser, side=unit), most)
    side = largest(
        lambda count: _fits(context, model, denoiser, 2, side=unit * count),
        2 if context.quick else 16,
    )
    return {
        "batch": batch.value,
        "batch ends": batch.reason,
        "side": unit * side.value,
        "side ends": side.reason,
    }


def _fits(context: Context, model: Any, denoiser: Denoiser, batch: int, side: int) -> str:
    try:
        size = side // denoiser.pixels
        args, kwargs = denoiser.inputs(batch, size, context.device, context.dtype)
        with torch.no_grad():
            model(*args, **kwargs)
    # A kernel may also raise for a size that its indices cannot hold.
    except (MemoryError, RuntimeError) as error:
        return first_line(error) if ran_out(error) else f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
        context.free()
    return ""
