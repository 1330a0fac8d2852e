"""Is it right on this device? Kernels against PyTorch, undo, repeats, syncs, graphs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tomesd
from benchmarks.gpu.context import Case, Context, Row, with_kernels

MODELS = {"sd15": 512, "flux": 1024, "sd3": 1024, "sdxl": 1024}


def cases(context: Context) -> Sequence[Case]:
    models = {"sd15": 512} if context.quick else MODELS
    found = [
        Case(f"{model} {size} px, {name}", partial(check, context, model, size), 20)
        for name, check in (("eager", eager), ("one graph", one_graph))
        for model, size in models.items()
    ]
    return [*found, Case("sd15, CUDA graphs", partial(cuda_graphs, context), 60)]


def eager(context: Context, model: str, size: int) -> Row:
    """In fp32, where rounding decides least about what merges."""
    denoiser_model, denoiser = context.build(model, torch.float32)
    call = _call(denoiser_model, context.inputs(denoiser, size, torch.float32))
    before = call()
    tomesd.apply_patch(denoiser_model)
    with with_kernels(False):
        pytorch = call()
    with with_kernels(True):
        fused, again = call(), call()
        syncs = _syncs(context, call)
    tomesd.remove_patch(denoiser_model)
    return {
        "kernels against PyTorch": _difference(fused, pytorch),
        "merging against unpatched": _difference(pytorch, before),
        "two runs are equal": torch.equal(fused, again),
        "undo is bit for bit": torch.equal(call(), before),
        "syncs": syncs,
    }


def one_graph(context: Context, model: str, size: int) -> Row:
    """torch.compile(fullgraph=True) of the patched model, against eager."""
    denoiser_model, denoiser = context.build(model)
    tomesd.apply_patch(denoiser_model)
    inputs = context.inputs(denoiser, size)
    expected = _call(denoiser_model, inputs)()
    backend = "inductor" if context.is_gpu else "aot_eager"
    compiled = torch.compile(denoiser_model, fullgraph=True, dynamic=False, backend=backend)
    got = _call(compiled, inputs)()
    return {"compiled against eager": _difference(got, expected)}


def cuda_graphs(context: Context) -> Row:
    """reduce-overhead, and whether inductor skipped CUDA graphs."""
    model, denoiser = context.build("sd15")
    tomesd.apply_patch(model)
    from torch._dynamo.utils import counters  # Late: it imports the compiler.

    counters.clear()
    options: dict[str, Any] = (
        {"mode": "reduce-overhead"} if context.is_gpu else {"backend": "eager"}
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **options)
    call = _call(compiled, context.inputs(denoiser, 512))
    outputs = []
    for _ in range(3):
        outputs.append(call())
    return {
        "skipped": counters["inductor"]["cudagraph_skips"],
        "two runs are equal": torch.equal(outputs[-1], outputs[-2]),
    }


def _call(model: Any, inputs: tuple[tuple, dict[str, Any]]) -> Callable[[], Tensor]:
    args, kwargs = inputs

    def call() -> Tensor:
        with torch.no_grad():
            return model(*args, **kwargs)[0].clone()

    return call


def _syncs(context: Context, call: Callable[[], object]) -> str:
    """Empty, or how the patched forward waited for the device."""
    if not context.is_gpu:
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _difference(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the expected one's."""
    wide = expected.float()
    return float((got.float() - wide).norm() / wide.norm())
