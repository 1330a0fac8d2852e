"""How long a step of LoRA training takes, and how much memory, while tokens merge."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tomesd.evaluation import full_size
from tomesd.evaluation.benchmark import Setup, new_row, summarize
from tomesd.evaluation.memory import Peak, in_child, peak_memory
from tomesd.evaluation.timing import interleave, seconds
from tomesd.evaluation.variants import Variant, prepare

# What diffusers' own training scripts adapt, with their rank.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 4


def check_peft() -> None:
    """Raises ModuleNotFoundError if peft, which makes the adapters, is not there."""
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("LoRA training needs peft: pip install peft")


def measure_training(setup: Setup) -> list[dict[str, Any]]:
    """One row for each size and variant, without and with gradient checkpointing.

    >>> rows = measure_training(setup)

    A step is a forward, a backward and AdamW's step of the adapter alone. All of a size take turns,
    and each is compared with the unpatched step that has as much checkpointing.
    """
    peaks = {}
    if setup.measures_memory:
        tasks = [(size, *how) for size in setup.sizes for how in _ways(setup)]
        for size, checkpointing, variant in tqdm(tasks, desc="memory", unit="process"):
            peak = in_child(step_peak, setup, size, variant, checkpointing)
            peaks[size, checkpointing, variant.name] = peak._asdict()
    model = setup.denoiser.build(setup.device, setup.dtype)
    return [row for size in setup.sizes for row in _measure_size(setup, model, size, peaks)]


def _ways(setup: Setup) -> list[tuple[bool, Variant]]:
    return [(each, variant) for each in (False, True) for variant in setup.variants]


def _label(name: str, checkpointing: bool) -> str:
    return f"{name}, checkpoints" if checkpointing else name


def _measure_size(setup: Setup, model: Any, size: int, peaks: dict) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[], float]] = {}
    rows: dict[bool, dict[str, dict]] = {False: {}, True: {}}
    for checkpointing, variant in tqdm(_ways(setup), desc=f"{size} px, warming up", unit="step"):
        row = new_row(variant, size) | {"checkpointing": checkpointing}
        row["memory"] = peaks.get((size, checkpointing, variant.name))
        rows[checkpointing][variant.name] = row
        twin = full_size.share_weights(model)
        step = training_step(setup, twin, size, variant, checkpointing)
        try:
            step()
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
            continue
        runs[_label(variant.name, checkpointing)] = partial(seconds, step, setup.device)
    with tqdm(total=setup.rounds * len(runs), desc=f"{size} px", unit="step") as bar:
        times = interleave(runs, setup.rounds, bar.update)
    for checkpointing, same in rows.items():
        labels = {name: _label(name, checkpointing) for name in same}
        summarize(same, {name: times[at] for name, at in labels.items() if at in times})
    return [row for same in rows.values() for row in same.values()]


def training_step(
    setup: Setup, model: Any, size: int, variant: Variant, checkpointing: bool
) -> Callable[[], Tensor]:
    """A function that trains a LoRA adapter of a frozen model for one step and returns the loss.

    >>> step = training_step(setup, unet, 512, Variant("unpatched", "unpatched"), True)
    >>> losses = [step() for _ in range(5)]

    The model is changed in place: it gets a new adapter on the projections of all attention. What
    it learns, to tell some noise from other noise, is of no interest, but always the same.
    """
    from peft import LoraConfig  # Late: all else is measured without it.

    adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.train().add_adapter(adapter)
    if checkpointing:
        model.enable_gradient_checkpointing()
    prepare(model, variant)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    args, kwargs = setup.inputs(size)

    def step() -> Tensor:
        prediction = model(*args, **kwargs)[0]
        target = full_size.noise(tuple(prediction.shape), setup.device, torch.float32)
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def step_peak(setup: Setup, size: int, variant: Variant, checkpointing: bool) -> Peak:
    """Memory of one step; on the CPU, call it in a fresh process (`memory.in_child`)."""
    model = setup.denoiser.build(setup.device, setup.dtype)
    step = training_step(setup, model, size, variant, checkpointing)
    return peak_memory(step, setup.device)
