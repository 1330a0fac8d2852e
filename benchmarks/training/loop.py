"""The training loop: one stage, resumable from its checkpoint."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from tomesd.pictures.files import atomic_write

_CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """A stage of training with one learning-rate schedule.

    >>> Stage("classifier", steps=3600, batch=32, lr=1e-3).lr_at(3599) < 1e-6
    True

    lr: reached after `warmup` steps, followed by cosine decay to `final` times itself.
    """

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    final: float = 0.0
    ema: float = 0.998

    def lr_at(self, step: int) -> float:
        progress = step / self.steps
        fall = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * min(1, (step + 1) / self.warmup) * fall


class CheckpointError(ValueError):
    """A checkpoint of another training, which cannot be resumed."""


def check_checkpoint(
    checkpoint: Path, stage: Stage, metadata: Mapping[str, Any] | None = None
) -> None:
    """Raises CheckpointError if the file exists and has another stage or other metadata.

    >>> check_checkpoint(Path("runs/shapes/classifier.pt"), stage, {"pictures": 16384})

    metadata: of `train`, or a part of it.
    """
    if not checkpoint.exists():
        return
    saved = torch.load(checkpoint, map_location="cpu", mmap=True).get("metadata", {})
    differ = [
        f"{name}={saved.get(name)!r} in it, {value!r} now"
        for name, value in (asdict(stage) | dict(metadata or {})).items()
        if saved.get(name) != value
    ]
    if differ:
        raise CheckpointError(
            f"{checkpoint} is of another training: {'; '.join(differ)}. Delete it, or choose "
            "another folder"
        )


def train(
    stage: Stage,
    model: nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    checkpoint: Path,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Train `model` in place, with its averaged (EMA) weights at the end.

    >>> train(stage, model, loss, Path("runs/classifier.pt"), {"pictures": 16384})

    loss: draws a batch with the generator that it gets, which depends on the step's number alone,
        so that a resumed run is the same as an uninterrupted one.
    checkpoint: written every 100 steps; an existing one is resumed.
    metadata: plain values by name that the weights depend on beside the stage, such as the data.
    Raises CheckpointError for a checkpoint of another stage or with other metadata.
    """
    check_checkpoint(checkpoint, stage, metadata)
    optimizer = make_optimizer(stage, model)
    parameters = optimizer.param_groups[0]["params"]
    device = parameters[0].device
    ema = EMAModel(parameters, decay=stage.ema, use_ema_warmup=True, power=0.75)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        ema.to(device)

    mean_loss = 0.0
    with tqdm(total=stage.steps, initial=start, desc=stage.name, mininterval=5) as progress:
        for step in range(start, stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.lr_at(step)
            value = loss(torch.Generator().manual_seed(step))
            update(optimizer, value)
            ema.step(parameters)
            mean_loss += (value.item() - mean_loss) / min(step - start + 1, 100)
            progress.update()
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == stage.steps:
                state = {
                    "metadata": asdict(stage) | dict(metadata or {}),
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema.state_dict(),
                }
                with atomic_write(checkpoint) as partial:
                    torch.save(state, partial)
    ema.copy_to(parameters)


def make_optimizer(stage: Stage, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW for all parameters that are not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One optimizer step, with gradients clipped to a norm of 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
