"""The rates of `tomesd.core.cost`, measured on this device."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.common.timing import seconds, synchronize
from benchmarks.gpu.context import Case, Context, Row


def cases(context: Context) -> Sequence[Case]:
    return [Case("rates", partial(rates, context), 10)]


def rates(context: Context) -> Row:
    """The best of several rounds, as fields of `cost.Rates`."""
    tokens, channels = (256, 64) if context.quick else (8192, 1280)
    item = torch.finfo(context.dtype).bits // 8
    x = context.noise(tokens, channels)
    weight = context.noise(4 * channels, channels)
    q = context.noise(2, 8, tokens // 2, 64)
    scores = context.noise(tokens, 1024)
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(context.device)
    linear = _best(context, lambda: F.linear(x, weight))
    attention = _best(context, lambda: F.scaled_dot_product_attention(q, q, q))
    added = _best(context, lambda: x + x)
    gathered = _best(context, lambda: x.index_select(0, rows))
    best = _best(context, lambda: scores.max(-1))
    largest = scores.flatten()[: 2 * 12288].view(2, -1) if not context.quick else scores
    topk = _best(context, lambda: largest.topk(largest.shape[1] * 2 // 3, sorted=False))
    return {
        "matmul": 2 * tokens * channels * 4 * channels / linear,
        "attention": 4 * q.numel() * q.shape[2] / attention,
        "memory": 3 * x.numel() * item / added,
        "rows": 2 * x.numel() * item / gathered,
        "best": scores.numel() * item / best,
        "topk": largest.numel() * item / topk,
        "call": _call(context),
        "host": _host(context),
        "itemsize": item,
    }


def _best(context: Context, run: Callable[[], object], times: int = 20) -> float:
    """Seconds of one of several calls in a row, so that launches overlap with work."""
    run()

    def several() -> None:
        for _ in range(times):
            run()

    return min(seconds(several, context.device) for _ in range(context.rounds)) / times


def _call(context: Context) -> float:
    """Seconds of a kernel with nothing to do."""
    x = context.noise(16)
    return _best(context, lambda: x.neg_(), 200)


def _host(context: Context) -> float:
    """Seconds that Python and the dispatcher take to prepare one operator of a linear layer."""
    layer = torch.nn.Linear(16, 16, device=context.device, dtype=context.dtype)
    x = context.noise(16, 16)
    with torch.no_grad():
        layer(x)
        synchronize(context.device)
        start = time.perf_counter()
        for _ in range(100):
            layer(x)
        taken = time.perf_counter() - start  # Without waiting for the device.
    synchronize(context.device)
    return taken / 100
