"""What proportional attention costs inside fused attention, in each form."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.common.timing import Spread, interleave, round_ratio, seconds
from benchmarks.models import unets
from benchmarks.speed.setup import Setup
from tomesd.diffusion.matcher import Matcher

HEADS = 8


def forms(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Fused attention without the sizes of its keys, and with them in two forms.

    >>> results = forms(q, k, v, size.log().transpose(1, 2)[:, None])

    q, k, v: [B, H, N, D]. bias: [B, 1, 1, keys], added to the logits.
    "bias" passes it to the kernel. "one more feature" is for kernels without a bias: bias / scale
    is appended to the keys, 1 to the queries and 0 to the values, which the output loses again.
    """
    scale = q.shape[-1] ** -0.5

    def with_feature() -> Tensor:
        ones = torch.ones_like(q[..., :1])
        sizes = (bias / scale).transpose(2, 3).expand(*k.shape[:3], 1)
        longer = torch.cat([q, ones], -1), torch.cat([k, sizes], -1), F.pad(v, (0, 1))
        return F.scaled_dot_product_attention(*longer, scale=scale)[..., :-1]

    return {
        "none": partial(F.scaled_dot_product_attention, q, k, v),
        "bias": partial(F.scaled_dot_product_attention, q, k, v, attn_mask=bias),
        "one more feature": with_feature,
    }


def measure_bias(setup: Setup) -> Iterator[list[dict[str, Any]]]:
    """The rows of each size, one for each level, variant and form: seconds of attention on the
    merged tokens.

    >>> rows = [row for rows in measure_bias(setup) for row in rows]
    """
    for size in setup.sizes:
        rows = []
        for level in unets.levels(setup.denoiser.config, setup.latents(size)):
            for variant in setup.variants:
                assert variant.settings is not None
                rows += _measure_level(setup, size, level, variant.settings)
        yield rows


def _measure_level(setup: Setup, size: int, level: unets.Level, settings: Any) -> list[dict]:
    left = level.h * level.w - Matcher(settings).merged(settings.ratio, level.h, level.w)
    queries = left if settings.merge_queries else level.h * level.w

    def noise(tokens: int, channels: int) -> Tensor:
        return unets.noise((setup.batch, tokens, channels), setup.device, setup.dtype)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    x, y = heads(noise(queries, level.channels)), heads(noise(left, level.channels))
    bias = noise(left, 1).transpose(1, 2)[:, None].abs()
    runs = {name: partial(seconds, run, setup.device) for name, run in forms(x, y, y, bias).items()}
    for run in runs.values():
        run()
    with tqdm(total=setup.rounds * len(runs), desc=f"{queries} × {left}", unit="run") as bar:
        times = interleave(runs, setup.rounds, bar.update)
    return [
        {
            "size": size,
            **asdict(level),
            "queries": queries,
            "keys": left,
            "form": name,
            "seconds": own,
            "median_seconds": asdict(Spread.of(own)),
            "of_none": asdict(round_ratio(own, times["none"])),
        }
        for name, own in times.items()
    ]
