"""Training the models of the Shapes world: one resumable loop and the three losses."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from tomesd.shapes.pipeline import split_logits
from tomesd.shapes.world import draw, draw_mask, scene

_CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """One stretch of training at one learning-rate schedule.

    lr is reached after `warmup` steps and then falls on a cosine to `final` times itself.
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
    """A checkpoint that training cannot go on from, since it is of another one."""


def check_checkpoint(
    checkpoint: Path, stage: Stage, about: Mapping[str, Any] | None = None
) -> None:
    """Raises CheckpointError if the file is there and of a stage, or about something, else.

    >>> check_checkpoint(Path("runs/shapes/classifier.pt"), stage, {"pictures": 16384})

    about: as `train` takes it, or a part of it.
    """
    if not checkpoint.exists():
        return
    saved = torch.load(checkpoint, map_location="cpu", mmap=True).get("about", {})
    differ = [
        f"{name}={saved.get(name)!r} there, {value!r} now"
        for name, value in (asdict(stage) | dict(about or {})).items()
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
    about: Mapping[str, Any] | None = None,
) -> None:
    """Train `model` in place and leave it with its averaged (EMA) weights.

    loss draws its own batch from the generator it is given; a step's batch depends on the step's
    number alone, so a run that was interrupted goes on as if it had not been.
    checkpoint: written whole every 100 steps, and read first if it is there.
    about: by name, what the weights depend on beside the stage, such as the data; plain values.
    Raises CheckpointError for a checkpoint of another stage, or about something else.
    """
    check_checkpoint(checkpoint, stage, about)
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
                    "about": asdict(stage) | dict(about or {}),
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema.state_dict(),
                }
                partial = checkpoint.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(checkpoint)
    ema.copy_to(parameters)


def make_optimizer(stage: Stage, model: nn.Module) -> torch.optim.Optimizer:
    """Of everything in the model that is not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step down the loss, with gradients of a norm of at most 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def pictures(indices: Iterable[int], size: int) -> torch.Tensor:
    """The scenes with these indices, drawn: uint8 [n, 3, size, size]."""
    drawn = [
        np.asarray(draw(scene(index), size))
        for index in tqdm(indices, desc=f"drawing at {size} px", mininterval=5)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def cached(file: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor that make() returns, made once and kept in a file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    return torch.load(file, mmap=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` on leaving; after an exception it is gone.

    >>> with atomic_folder(Path("assets/classifier")) as partial:
    ...     model.save_pretrained(partial)

    What was at `path` before stays until the new folder is complete, and is then deleted.
    """
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))

    def settle() -> None:
        if old.exists() and not path.exists():  # stopped between the two renames
            old.rename(path)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)

    settle()
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        settle()


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to floats from -1 to 1, as autoencoder and classifier take them."""
    return images.float() / 127.5 - 1


def pick(data: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(len(data), (batch,), generator=generator)


def autoencoder_loss(
    model: AutoencoderKL, images: torch.Tensor, batch: int, generator: torch.Generator
) -> torch.Tensor:
    """L1 and half the squared error on random 64×64 crops, and a little KL.

    The KL term is there to keep the latents smooth under noise, which is what a denoiser needs.
    """
    rows = pick(images, batch, generator)
    y, x = torch.randint(images.shape[-1] - 64 + 1, (2,), generator=generator).tolist()
    crops = to_unit(images[rows, :, y : y + 64, x : x + 64].to(model.device))
    posterior = model.encode(crops).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(model.device)
    decoded = model.decode(posterior.mean + posterior.std * noise).sample
    error = F.l1_loss(decoded, crops) + 0.5 * F.mse_loss(decoded, crops)
    return error + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()


def denoiser_loss(
    model: Callable[..., torch.Tensor],
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    input_ids: torch.Tensor,
    empty_prompt: torch.Tensor,
    batch: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Squared error of v, weighted min(SNR, 5) / (SNR + 1) (Hang et al., 2023); 10% without prompt.

    model maps (noisy latents, timesteps, input_ids) to v. The timesteps of a batch are spread
    evenly over the schedule, so that the loss is less noisy than with independent ones.
    """
    device = latents.device
    rows = pick(latents, batch, generator)
    clean = latents[rows.to(device)]
    noise = torch.randn(clean.shape, generator=generator).to(device)
    spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (spread * scheduler.config.num_train_timesteps).long().to(device)
    ids = input_ids[rows.to(device)]
    dropped = torch.rand(batch, 1, generator=generator).to(device) < 0.1
    ids = torch.where(dropped, empty_prompt, ids)

    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps)
    predicted = model(noisy, timesteps, ids)
    snr = compute_snr(scheduler, timesteps)
    weight = snr.clamp(max=5) / (snr + 1)
    return (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()


class MaskedClassifier(nn.Module):
    """The classifier with a second, dense task: which parts of each patch the shape covers.

    From labels alone a ViT of this size had learnt colors and backgrounds after 800 steps, but
    shapes no better than 21% (chance: 13%). What the patches show is quickly learnt, and the class
    token then only has to look. The second head is used in training only.
    """

    CELLS = 4

    def __init__(self, classifier: ViTForImageClassification):
        super().__init__()
        self.classifier = classifier
        self.mask_head = nn.Linear(classifier.config.hidden_size, self.CELLS**2)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits [B, 28] and mask logits [B, patches, CELLS²]."""
        tokens = self.classifier.vit(pixels).last_hidden_state
        return self.classifier.classifier(tokens[:, 0]), self.mask_head(tokens[:, 1:])


def masks(indices: Iterable[int], patches: int) -> torch.Tensor:
    """What MaskedClassifier's second head learns: uint8 [n, patches², CELLS²], 255 is covered."""
    size = patches * MaskedClassifier.CELLS
    drawn = torch.stack(
        [torch.from_numpy(np.array(draw_mask(scene(index), size))) for index in indices]
    )
    cells = F.unfold(drawn[:, None].float(), MaskedClassifier.CELLS, stride=MaskedClassifier.CELLS)
    return cells.transpose(1, 2).byte()


class LabelledPictures(NamedTuple):
    """What the classifier learns from.

    images: uint8 [n, 3, 128, 128]. covered: see `masks`. labels: int64 [n, 4], of `Scene.labels`,
    on the device where batches go.
    """

    images: torch.Tensor
    covered: torch.Tensor
    labels: torch.Tensor


def labelled_pictures(
    count: int, config: ViTConfig, folder: Path, device: torch.device | str
) -> LabelledPictures:
    """The first `count` scenes for such a classifier; drawn once and kept in a folder.

    >>> data = labelled_pictures(4096, model.config, Path("runs/shapes"), "cpu")
    """
    indices, size = range(count), config.image_size
    images = cached(folder / f"pictures-{size}-{count}.pt", lambda: pictures(indices, size))
    covered = cached(
        folder / f"masks-{count}.pt", lambda: masks(indices, size // config.patch_size)
    )
    labels = torch.tensor([scene(index).labels for index in indices])
    return LabelledPictures(images, covered, labels.to(device))


def classifier_loss(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    data: LabelledPictures,
    batch: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Cross-entropy summed over shape, color, kind, ground and mask, on soft and noisy pictures.

    Generated pictures are a little soft; a classifier that saw only crisp ones would misread them.
    """
    images, covered, labels = data
    device = labels.device
    rows = pick(images, batch, generator)
    clean = to_unit(images[rows].to(device))
    soft = F.interpolate(F.avg_pool2d(clean, 2), scale_factor=2, mode="bilinear")
    blend = torch.rand(batch, 1, 1, 1, generator=generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    logits, mask = model(torch.lerp(clean, soft, blend) + 0.05 * noise)
    targets = labels[rows.to(device)]
    losses = [
        F.cross_entropy(part.float(), targets[:, group])
        for group, part in enumerate(split_logits(logits).values())
    ]
    dense = F.binary_cross_entropy_with_logits(mask.float(), covered[rows].to(device) / 255)
    return torch.stack(losses).sum() + 2 * dense
