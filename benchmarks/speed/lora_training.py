"""Time and memory of a LoRA training step with token merging."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.common.memory import Peak, in_child, peak_memory
from benchmarks.common.timing import interleave, seconds
from benchmarks.models.unets import noise, share_weights
from benchmarks.speed.forwards import summarize
from benchmarks.speed.setup import Setup, new_row, record_failure
from benchmarks.speed.variants import Variant, prepare

# The layers that diffusers' own training scripts adapt, with their rank.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 4


def check_peft() -> None:
    """Raises ModuleNotFoundError if peft, which makes the adapters, is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("LoRA training needs peft: pip install peft")


def measure_training(setup: Setup) -> Iterator[list[dict[str, Any]]]:
    """The rows of each size, one for each variant, without and with gradient checkpointing.

    >>> rows = [row for rows in measure_training(setup) for row in rows]

    A step is a forward, a backward and AdamW's step of the adapter. The steps of a size are
    interleaved; each is compared with the unpatched step with the same checkpointing.
    """
    rows = {
        size: [
            new_row(variant, size) | {"checkpointing": each}
            for each, variant in _combinations(setup)
        ]
        for size in setup.sizes
    }
    if setup.measures_memory:
        tasks = [
            (row, *combination)
            for same in rows.values()
            for row, combination in zip(same, _combinations(setup), strict=True)
        ]
        for row, checkpointing, variant in tqdm(tasks, desc="memory", unit="process"):
            with record_failure(row):
                peak = in_child(step_peak, setup, row["size"], variant, checkpointing)
                row["memory"] = peak._asdict()
        if all("error" in row for row, *_ in tasks):
            yield from rows.values()
            return
    model = setup.denoiser.build(setup.device, setup.dtype)
    for same in rows.values():
        _measure_size(setup, model, same)
        yield same


def _combinations(setup: Setup) -> list[tuple[bool, Variant]]:
    return [(each, variant) for each in (False, True) for variant in setup.variants]


def _label(row: dict[str, Any]) -> str:
    return f"{row['variant']}, checkpoints" if row["checkpointing"] else row["variant"]


def _measure_size(setup: Setup, model: Any, rows: list[dict[str, Any]]) -> None:
    """Time all rows of a size that did not fail, interleaved, and add the results to them."""
    runs: dict[str, Callable[[], float]] = {}
    size = rows[0]["size"]
    tasks = list(zip(rows, _combinations(setup), strict=True))
    for row, (checkpointing, variant) in tqdm(tasks, desc=f"{size} px, warm-up", unit="step"):
        if "error" in row:
            continue
        with record_failure(row):
            twin = share_weights(model)
            step = training_step(setup, twin, size, variant, checkpointing)
            step()
            runs[_label(row)] = partial(seconds, step, setup.device)
    with tqdm(total=setup.rounds * len(runs), desc=f"{size} px", unit="step") as bar:
        times = interleave(runs, setup.rounds, bar.update)
    for checkpointing in (False, True):
        same = {row["variant"]: row for row in rows if row["checkpointing"] == checkpointing}
        labels = {name: _label(row) for name, row in same.items()}
        summarize(same, {name: times[label] for name, label in labels.items() if label in times})


def training_step(
    setup: Setup, model: Any, size: int, variant: Variant, checkpointing: bool
) -> Callable[[], Tensor]:
    """A function that trains a LoRA adapter of a frozen model for one step and returns the loss.

    >>> step = training_step(setup, unet, 512, Variant("unpatched", "unpatched"), True)
    >>> losses = [step() for _ in range(5)]

    The model gets a new adapter on all attention projections, in place. The task, to predict noise
    from other noise, is useless, but always the same.
    """
    from peft import LoraConfig  # Late: only this needs peft.

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
        target = noise(tuple(prediction.shape), setup.device, torch.float32)
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
