"""A ratio for each block of a denoiser, chosen once from what merging changes in a few images."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tomesd import registry
from tomesd.api import patched
from tomesd.checks import require_int, require_type
from tomesd.diffusion.dit import DiT
from tomesd.diffusion.unet import UNet
from tomesd.hooks import PATCH, DenoiserPatch
from tomesd.targets import modules_of

# What is measured of each block; in between, its change and its work are taken for linear. Small
# ratios change least for what they save.
_RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
_EVERYWHERE: dict[str, Any] = {"max_downsample": 8}

Curves = Mapping[str, Sequence[tuple[float, float, float]]]


@dataclass(frozen=True)
class Recorded:
    """Calls of a denoiser, by their arguments.

    guidance: of a run whose batch has both halves, without and with the prompt; else 1.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    guidance: float = 1.0

    def guided(self, change: Tensor) -> Tensor:
        """What the scheduler gets to see: what differs between the halves counts `guidance` times,
        and what does not counts once."""
        if self.guidance == 1:
            return change
        without, with_prompt = change.chunk(2)
        return without + self.guidance * (with_prompt - without)


@torch.no_grad()
def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    speedup: float | None = None,
    similarity: float | None = None,
    samples: int = 4,
    **call: Any,
) -> dict[str, float]:
    """A ratio for each block of a pipeline's denoiser, for `apply_patch(pipe, ratio=...)`.

    >>> ratios = tomesd.calibrate(pipe, ["a red heart", "a blue star"], speedup=1.3)
    >>> pipe = tomesd.apply_patch(pipe, ratio=ratios, preset="late")

    Blocks differ by orders of magnitude in what merging changes. The pipeline makes one image of
    each prompt; then, in a few of its steps, the denoiser runs with one block merging at a time.

    pipe: a diffusers pipeline with one denoiser, a UNet or a diffusion transformer.
    prompts: two to four are enough.
    speedup: how many times fewer floating-point operations the whole denoiser shall take, in the
        steps that merge. Ratios rise where the output changes least for what is saved.
    similarity: instead of speedup, a threshold of cosine similarity, as of tokens to merge. Each
        block merges as many as reach it on average: a fixed number, so that shapes stay static.
    samples: in how many steps, evenly spread, the change is measured. It takes six forwards for
        each block and sample.
    call: further arguments of the pipeline, such as num_inference_steps, height and width: those
        of later use.

    Returns the ratio of each block by its name, of each spatial transformer in a UNet; what merges
    nothing is left out. The values may be replaced by schedules. Nothing stays patched, and a patch
    that was there comes back. The global random state is left alone.
    Raises TypeError for a pipeline without a denoiser or with several, ValueError for anything out
    of range, such as a speedup that merging everywhere cannot reach.
    """
    if (speedup is None) == (similarity is None):
        raise TypeError(f"speedup or similarity must be given, got {speedup} and {similarity}")
    require_int("samples", samples, 1)
    prompts = [require_type("prompts", each, str) for each in prompts]
    if not prompts:
        raise ValueError("prompts must hold one prompt or more, got none")
    _check_range("speedup", speedup, 1, float("inf"))
    _check_range("similarity", similarity, -1, 1)
    denoiser = _denoiser(pipe)
    with ExitStack() as stack:
        stack.enter_context(patched(pipe, ratio=0.0))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        recorded = record(pipe, denoiser, prompts, samples, **call)
        if similarity is not None:
            return _alike(pipe, denoiser, recorded, similarity)
        assert speedup is not None
        curves, work = changes(pipe, denoiser, recorded, speedup)
        return greedy(curves, work - work / speedup)


def _check_range(name: str, value: float | None, above: float, below: float) -> None:
    if value is not None and not above < require_type(name, value, float) < below:
        raise ValueError(f"{name} must be above {above} and below {below}, got {value}")


def _denoiser(pipe: Any) -> nn.Module:
    modules = {} if isinstance(pipe, nn.Module) else modules_of(pipe)
    found = {n: m for n, m in modules.items() if isinstance(registry.find(m), UNet | DiT)}
    if len(set(found.values())) != 1 or not callable(pipe):
        names = ", ".join(found) or "none"
        raise TypeError(
            "pipe must be a diffusers pipeline with one denoiser that can merge, got a "
            f"{type(pipe).__name__} with {names}"
        )
    return next(iter(found.values()))


def record(
    pipe: Any, denoiser: nn.Module, prompts: Sequence[str], samples: int, **call: Any
) -> Recorded:
    """The calls of the denoiser in evenly spread steps of an unpatched run.

    >>> recorded = record(pipe, pipe.unet, ["a red heart"], samples=1, num_inference_steps=2)
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    batch = 0

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal batch
        batch = len(_first_tensor(output))

    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    handles = [
        denoiser.register_forward_pre_hook(keep, with_kwargs=True),
        denoiser.register_forward_hook(count),
    ]
    try:
        pipe(prompt=list(prompts), **{"generator": generators, "output_type": "latent"} | call)
    finally:
        for handle in handles:
            handle.remove()
    chosen = sorted({int((i + 0.5) * len(calls) / samples) for i in range(samples)})
    own = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    scale = call.get("guidance_scale", own.default if own else None)
    has_halves = batch == 2 * len(prompts) * call.get("num_images_per_prompt", 1)
    guidance = float(scale) if has_halves and isinstance(scale, int | float) else 1.0
    return Recorded([calls[i] for i in chosen], guidance)


def counting() -> FlopCounterMode:
    """Counts floating-point operations, of attention on a CPU too, which torch leaves out.

    >>> with counting() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.get_total_flops()
    48
    """
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of the shapes of its tensors."""
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _forwards(denoiser: nn.Module, recorded: Recorded) -> tuple[list[Tensor], int]:
    """The outputs of these calls, and the floating-point operations of one, which is like all."""
    outputs, counter = [], counting()
    for index, (args, kwargs) in enumerate(recorded.calls):
        with nullcontext() if index else counter:  # Counting is slow.
            outputs.append(denoiser(*args, **kwargs))
    return list(map(_first_tensor, outputs)), counter.get_total_flops()


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _patch_of(denoiser: nn.Module) -> DenoiserPatch:
    patch: DenoiserPatch = denoiser.__dict__[PATCH]
    return patch


def changes(
    pipe: Any, denoiser: nn.Module, recorded: Recorded, speedup: float = 1.0
) -> tuple[Curves, int]:
    """What merging in each block alone changes and saves in these calls.

    >>> recorded = record(pipe, pipe.unet, ["a red heart"], samples=1, num_inference_steps=2)
    >>> curves, work = changes(pipe, pipe.unet, recorded)

    Returns (ratio, change, saved) of each block with rising ratios, the first all 0: the mean
    square of the change after guidance, and floating-point operations of one call. Also those of an
    unpatched call. Raises ValueError if no ratios reach the speedup.
    """
    plain, work = _forwards(denoiser, recorded)
    with patched(pipe, ratio=_RATIOS[-1], **_EVERYWHERE):
        patch = _patch_of(denoiser)
        most = work / _forwards(denoiser, recorded)[1]
        if speedup > most:
            raise ValueError(f"speedup must be at most {most:.3f} for this pipeline, got {speedup}")
        curves = {name: [(0.0, 0.0, 0.0)] for name in patch.ratio_names()}
        for name, curve in curves.items():
            for ratio in _RATIOS:
                # Patching anew for each would discard compiled code each time.
                patch.set_ratios({name: ratio})
                outputs, left = _forwards(denoiser, recorded)
                change = 0.0
                for own, other in zip(outputs, plain, strict=True):
                    moved = recorded.guided(own.float() - other.float())
                    change += moved.square().mean().item()
                curve.append((ratio, change, float(work - left)))
    return curves, work


def greedy(curves: Curves, goal: float) -> dict[str, float]:
    """The ratio of each block with which so much work is saved at little change in all.

    >>> greedy({"a": [(0, 0, 0), (0.5, 1, 10)], "b": [(0, 0, 0), (0.5, 9, 10)]}, 15)
    {'a': 0.5, 'b': 0.25}

    curves: as of `changes`, which are taken for additive. The next step is always the one that
        changes least for what it saves; the last one goes only as far as needed. Blocks that merge
        nothing are left out.
    """
    at, saved = dict.fromkeys(curves, 0), 0.0
    ratios: dict[str, float] = {}
    while saved < goal:
        steps = []
        for name, curve in curves.items():
            _, change, own = curve[at[name]]
            for index in range(at[name] + 1, len(curve)):
                more = curve[index][2] - own
                if more > 0:
                    steps.append((max(curve[index][1] - change, 0.0) / more, more, name, index))
        if not steps:
            break
        _, more, name, index = min(steps)
        low, high = curves[name][at[name]][0], curves[name][index][0]
        part = min(1.0, (goal - saved) / more)
        ratios[name] = round(low + (high - low) * part, 4)
        saved, at[name] = saved + more, index
    return ratios


def _alike(
    pipe: Any, denoiser: nn.Module, recorded: Recorded, similarity: float
) -> dict[str, float]:
    """The share of tokens that are this similar to the destination that they would merge into."""
    shares: dict[str, list[float]] = {}
    handles = []

    def watch(name: str, patch: DenoiserPatch, block: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            state = patch.state_of(block)
            if state.map is not None and state.x is not None:
                x = torch.nn.functional.normalize(state.x.float(), dim=-1)
                heads = state.map.head.gather(1, state.map.group)
                own = (x * x.gather(1, heads[..., None].expand_as(x))).sum(-1)
                moved = own.gather(1, state.map.moved)
                shares.setdefault(name, []).append((moved >= similarity).float().mean().item())

        handles.append(block.register_forward_pre_hook(note))

    with patched(pipe, ratio=_RATIOS[-1], **_EVERYWHERE):
        patch = _patch_of(denoiser)
        for name, blocks in patch.ratio_names().items():
            for block in blocks:
                watch(name, patch, block)
        try:
            _forwards(denoiser, recorded)
        finally:
            for handle in handles:
                handle.remove()
    ratios = {n: round(_RATIOS[-1] * sum(each) / len(each), 4) for n, each in shares.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio}
