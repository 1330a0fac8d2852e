"""Proportional attention: which kernel runs with a bias on the keys and which without."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.memory import first_line, ran_out
from benchmarks.common.timing import Spread, interleave, round_ratio, seconds, synchronize
from benchmarks.gpu.context import Case, Context, Row
from benchmarks.speed.attention_bias import forms

# Batch, heads, queries, keys and features of a head: of SD1.5, SDXL, SD3 and Flux with half of the
# tokens merged, and with merged keys only.
SHAPES = (
    *((2, 8, 2048, 2048, 40), (2, 8, 8192, 8192, 40), (2, 8, 32768, 32768, 40)),
    *((2, 8, 4096, 2048, 40), (2, 10, 2048, 2048, 64), (2, 20, 512, 512, 64)),
    *((2, 24, 2381, 2381, 64), (2, 24, 8525, 8525, 64), (1, 24, 2560, 2560, 128)),
    (1, 24, 8704, 8704, 128),
)


def cases(context: Context) -> Sequence[Case]:
    shapes = [(1, 2, 64, 32, 8)] if context.quick else SHAPES
    return [Case(_name(*shape), partial(measure, context, *shape), 8) for shape in shapes]


def _name(batch: int, heads: int, queries: int, keys: int, features: int) -> str:
    return f"{batch}×{heads} heads, {queries:,} × {keys:,} of {features}"


def measure(
    context: Context, batch: int, heads: int, queries: int, keys: int, features: int
) -> Row:
    """Seconds of each form, its time relative to none, and the kernels that it runs."""
    q = context.noise(batch, heads, queries, features)
    k = context.noise(batch, heads, keys, features)
    bias = context.noise(batch, 1, 1, keys).abs()
    runs = forms(q, k, k, bias) | {"eight more features": _padded(q, k, bias)}
    found: Row = {}
    timed = {}
    for name, run in runs.items():
        try:
            run()
            found[name] = {"kernels": _kernel_names(context, run)}
            timed[name] = partial(seconds, run, context.device)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            found[name] = {"error": first_line(error)}
    times = interleave(timed, 2 * context.rounds)
    for name, own in times.items():
        found[name]["seconds"] = asdict(Spread.of(own))
        if "none" in times:
            found[name]["of none"] = asdict(round_ratio(own, times["none"]))
    return found


def _padded(q: Tensor, k: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """One more feature, and seven zeros: flash attention wants a multiple of eight."""
    features, scale = q.shape[-1], q.shape[-1] ** -0.5

    def run() -> Tensor:
        longer_q = F.pad(q, (0, 8))
        longer_q[..., features] = 1
        longer_k = F.pad(k, (0, 8))
        longer_k[..., features] = (bias / scale)[:, :, 0]
        v = F.pad(k, (0, 8))
        return F.scaled_dot_product_attention(longer_q, longer_k, v, scale=scale)[..., :features]

    return run


def _kernel_names(context: Context, run: Callable[[], object]) -> list[str]:
    """The kernels that take most of the time, longest first."""
    activity = ProfilerActivity.CUDA if context.is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled, torch.no_grad():
        run()
        synchronize(context.device)
    by = "self_device_time_total" if context.is_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, by))
    return [event.key[:80] for event in events[:3]]
