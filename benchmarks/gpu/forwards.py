"""Forwards of denoisers: unpatched, patched, ideal and the peer; eager, compiled, captured."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

import tomesd
from benchmarks.common.timing import synchronize
from benchmarks.gpu.context import PEER, Case, Context, Row, with_kernels
from benchmarks.speed.forwards import measure_forwards
from benchmarks.speed.setup import Setup
from benchmarks.speed.variants import Variant, forward
from tomesd.diffusion.settings import diffusion_settings

# Model, pixels, compile mode, and about how many seconds it takes. In the order of worth.
RUNS: tuple[tuple[str, int, str | None, float], ...] = (
    *(("sd15", 512, None, 15), ("sd15", 1024, None, 15), ("sdxl", 1024, None, 25)),
    *(("flux", 1024, None, 15), ("sd3", 1024, None, 15)),
    *(("sd15", 512, "reduce-overhead", 90), ("sd15", 1024, "reduce-overhead", 90)),
    *(("sd15", 768, None, 15), ("sd15", 2048, None, 30)),
    *(("flux", 2048, None, 20), ("sd3", 2048, None, 20)),
    *(("sd15", 512, "default", 90), ("sdxl", 1024, "reduce-overhead", 200)),
    *(("flux", 1024, "default", 40), ("sd3", 1024, "default", 40)),
    *(("sd15", 1024, "default", 90), ("sd15", 2048, "default", 100)),
)


def cases(context: Context) -> Sequence[Case]:
    runs = (("sd15", 128, None, 10),) if context.quick else RUNS
    found = []
    for model, size, mode, expected in runs:
        name = f"{model} {size} px, {mode or 'eager'}"
        found.append(Case(name, partial(forwards, context, model, size, mode), expected))
        if mode is None:
            bound = partial(host_or_device, context, model, size)
            found.append(Case(f"{name}, bound", bound, expected))
            without = partial(forwards, context, model, size, mode, fused=False)
            found.append(Case(f"{name}, without kernels", without, expected))
    return found


def forwards(context: Context, model: str, size: int, mode: str | None, fused: bool = True) -> Row:
    """Seconds and peak memory of each variant, in interleaved rounds."""
    denoiser = context.denoiser(model)
    is_unet = "tiny" in denoiser.name or model in ("sd15", "sdxl")
    default = diffusion_settings(0.5, None, {})
    variants = [
        Variant("unpatched", "unpatched"),
        Variant("default", "patched", default),
    ]
    if fused:
        variants.append(Variant("ideal", "ideal", default))
        if is_unet:
            variants.insert(2, Variant("fast", "patched", diffusion_settings(0.5, "fast", {})))
    with_peer = fused and is_unet and "tomesd" in context.peers and mode is None
    if with_peer:
        attention = diffusion_settings(0.5, None, {"merge_attn": True})
        variants.append(Variant(PEER, "peer", attention))
    setup = Setup(
        denoiser=denoiser,
        sizes=[size],
        variants=variants,
        batch=denoiser.batch,
        rounds=context.rounds,
        device=context.device,
        precision=context.precision,
        compiled=mode,
        measures_memory=context.is_gpu,
        peer=context.peers["tomesd"] if with_peer else None,
        peer_name=PEER,
    )
    with with_kernels(fused):
        (rows,) = measure_forwards(setup)
    return {"rows": [{k: v for k, v in row.items() if k != "patch"} for row in rows]}


def host_or_device(context: Context, model: str, size: int) -> Row:
    """Whether Python or the device is what an eager forward waits for.

    launches: seconds until the call returns, without waiting for the device. kernels: the sum of
    the kernels' own seconds.
    """
    denoiser_model, denoiser = context.build(model)
    found: Row = {}
    for name, change in (
        ("unpatched", lambda: None),
        ("default", lambda: tomesd.apply_patch(denoiser_model)),
    ):
        change()
        call = forward(denoiser_model, context.inputs(denoiser, size), None)
        call()
        synchronize(context.device)
        start = time.perf_counter()
        call()
        launches = time.perf_counter() - start
        synchronize(context.device)
        total = time.perf_counter() - start
        kernels, count = _kernels(context, call)
        found[name] = {
            "seconds": total,
            "launches": launches,
            "kernels": kernels,
            "kernel count": count,
            "bound": "host" if launches > kernels else "device",
        }
    return found


def _kernels(context: Context, call: Callable[[], Any]) -> tuple[float, int]:
    activity = ProfilerActivity.CUDA if context.is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        call()
        synchronize(context.device)
    name = "self_device_time_total" if context.is_gpu else "self_cpu_time_total"
    events = [event for event in profiled.key_averages() if getattr(event, name) > 0]
    return sum(getattr(each, name) for each in events) / 1e6, sum(each.count for each in events)
