"""The losses of the Shapes models: autoencoder, denoiser and classifier."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import nn
from transformers import ViTForImageClassification

from benchmarks.training.data import MASK_CELLS, LabelledPictures, random_rows, to_unit
from tomesd.shapes.pipeline import split_logits


def autoencoder_loss(
    model: AutoencoderKL, images: torch.Tensor, batch: int, generator: torch.Generator
) -> torch.Tensor:
    """L1 and half the squared error on random 64×64 crops, and a little KL.

    The KL term keeps the latents smooth under noise, which the denoiser needs.
    """
    rows = random_rows(images, batch, generator)
    y, x = torch.randint(images.shape[-1] - 64 + 1, (2,), generator=generator).tolist()
    crops = to_unit(images[rows, :, y : y + 64, x : x + 64].to(model.device))
    posterior = model.encode(crops).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(model.device)
    decoded = model.decode(posterior.mean + posterior.std * noise).sample
    error = F.l1_loss(decoded, crops) + 0.5 * F.mse_loss(decoded, crops)
    return error + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()


class NoisyBatch(NamedTuple):
    """What a denoiser is trained on.

    rows: of the training data. noisy, target: latents and their v. weight: of each picture's loss.
    """

    rows: torch.Tensor
    noisy: torch.Tensor
    timesteps: torch.Tensor
    ids: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor

    def loss(self, predicted: torch.Tensor) -> torch.Tensor:
        """Squared error of v, weighted min(SNR, 5) / (SNR + 1) (Hang et al., 2023)."""
        return (self.weight * (predicted.float() - self.target).square().mean((1, 2, 3))).mean()


def noisy_batch(
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    input_ids: torch.Tensor,
    empty_prompt: torch.Tensor,
    batch: int,
    generator: torch.Generator,
) -> NoisyBatch:
    """Random latents with noise, and their prompts, 10% of them dropped.

    The timesteps of a batch are spread evenly over the schedule, which makes the loss less noisy
    than independent ones.
    """
    device = latents.device
    rows = random_rows(latents, batch, generator)
    clean = latents[rows.to(device)]
    noise = torch.randn(clean.shape, generator=generator).to(device)
    spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (spread * scheduler.config.num_train_timesteps).long().to(device)
    ids = input_ids[rows.to(device)]
    dropped = torch.rand(batch, 1, generator=generator).to(device) < 0.1
    snr = compute_snr(scheduler, timesteps)
    return NoisyBatch(
        rows,
        scheduler.add_noise(clean, noise, timesteps),
        timesteps,
        torch.where(dropped, empty_prompt, ids),
        scheduler.get_velocity(clean, noise, timesteps),
        snr.clamp(max=5) / (snr + 1),
    )


def denoiser_loss(model: Callable[..., torch.Tensor], drawn: NoisyBatch) -> torch.Tensor:
    """The loss of a model that maps (noisy latents, timesteps, input_ids) to v."""
    return drawn.loss(model(drawn.noisy, drawn.timesteps, drawn.ids))


def transformer_loss(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    drawn: NoisyBatch,
    covered: torch.Tensor,
) -> torch.Tensor:
    """The same for a model that returns v and mask logits, with the masks as a second task.

    covered: see `masks`. As for the classifier, the shape is learnt sooner with it.
    """
    predicted, mask = model(drawn.noisy, drawn.timesteps, drawn.ids)
    targets = covered[drawn.rows].to(mask.device) / 255
    return drawn.loss(predicted) + 0.5 * F.binary_cross_entropy_with_logits(mask.float(), targets)


class MaskedClassifier(nn.Module):
    """The classifier with a second, dense task: which parts of each patch the shape covers.

    >>> masked = MaskedClassifier(classifier)

    From labels alone a ViT of this size had learnt colors and backgrounds after 800 steps, but
    shapes to 21% only (chance: 13%). The dense task is learnt quickly, and the class token can use
    its features. The second head is used in training only.
    """

    def __init__(self, classifier: ViTForImageClassification):
        super().__init__()
        self.classifier = classifier
        self.mask_head = nn.Linear(classifier.config.hidden_size, MASK_CELLS**2)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits [B, 28] and mask logits [B, patches, MASK_CELLS²]."""
        tokens = self.classifier.vit(pixels).last_hidden_state
        return self.classifier.classifier(tokens[:, 0]), self.mask_head(tokens[:, 1:])


def classifier_loss(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    data: LabelledPictures,
    batch: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Cross-entropy summed over shape, color, kind, ground and mask, on soft and noisy pictures.

    Generated pictures are a little soft; a classifier trained on crisp ones only misreads them.
    """
    images, covered, labels = data
    device = labels.device
    rows = random_rows(images, batch, generator)
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
