"""Distilling the UNet to few steps: latent consistency (Luo et al., 2023)."""

from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks.common.files import atomic_folder
from benchmarks.training import architectures
from benchmarks.training.data import random_rows
from benchmarks.training.loop import train
from benchmarks.training.shapes_models import Settings, load_teacher, prompt_ids, scaled_latents

# Guidance scales that the student learns; the teacher's pictures look best at 4.
GUIDANCE = (3.0, 5.0)
# The teacher takes a step of this many timesteps: 25 from noise to picture.
_HOP = 40


class Consistency:
    """The loss of one step: the student says the same picture before and after a teacher's step.

    >>> loss = Consistency(pipe, scheduler)(student, latents, features, empty, 32, generator)
    """

    def __init__(self, pipe: StableDiffusionPipeline, scheduler: LCMScheduler):
        self.pipe, self.scheduler = pipe, scheduler
        alphas = scheduler.alphas_cumprod.to(pipe.device)
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        # Those that a pipeline with this scheduler may ask for.
        scale = scheduler.config.num_train_timesteps // scheduler.config.original_inference_steps
        self.timesteps = torch.arange(scale - 1, scheduler.config.num_train_timesteps, scale)

    def picture(self, v: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a v stands for."""
        return _at(self.signal, timesteps) * noisy - _at(self.noise, timesteps) * v

    def student(self, unet: Any, noisy: Tensor, timesteps: Tensor, *given: Tensor) -> Tensor:
        """What LCMScheduler makes of the student's answer."""
        scaled = timesteps * self.scheduler.config.timestep_scaling
        skip = (0.25 / (scaled**2 + 0.25))[:, None, None, None]
        out = (scaled / (scaled**2 + 0.25).sqrt())[:, None, None, None]
        v = unet(noisy, timesteps, *given).sample.float()
        return skip * noisy + out * self.picture(v, noisy, timesteps)

    @torch.no_grad()
    def teacher_step(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        until: Tensor,
        text: Tensor,
        empty: Tensor,
        w: Tensor,
    ) -> Tensor:
        """A DDIM step with classifier-free guidance."""
        both = torch.cat([text, empty.expand_as(text)])
        v = self.pipe.unet(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).sample.float()
        told, free = v.chunk(2)
        v = told + w[:, None, None, None] * (told - free)
        clean = self.picture(v, noisy, timesteps)
        noise = _at(self.noise, timesteps) * noisy + _at(self.signal, timesteps) * v
        return _at(self.signal, until) * clean + _at(self.noise, until) * noise

    def __call__(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        text: Tensor,
        batch: int,
        generator: torch.Generator,
    ) -> Tensor:
        """text: features [pictures + 1, 16, C] of each prompt and of the empty one."""
        device = latents.device
        rows = random_rows(latents, batch, generator).to(device)
        picked = torch.randint(len(self.timesteps), (batch,), generator=generator)
        timesteps = self.timesteps[picked].to(device)
        until = (timesteps - _HOP).clamp(min=0)
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(batch, generator=generator).to(device)
        noise = torch.randn(latents[rows].shape, generator=generator).to(device)
        noisy = _at(self.signal, timesteps) * latents[rows] + _at(self.noise, timesteps) * noise
        # As StableDiffusionPipeline counts it: 0 is no guidance.
        w = guidance - 1
        width = architectures.GUIDANCE_WIDTH
        told = self.pipe.get_guidance_scale_embedding(w, embedding_dim=width).to(device)
        given = (text[rows], None, told)
        nearer = self.teacher_step(noisy, timesteps, until, text[rows], text[-1:], w)
        with torch.no_grad():
            target = self.student(unet, nearer, until, *given)
        error = self.student(unet, noisy, timesteps, *given) - target
        # Pseudo-Huber, as in the paper: nearly L1.
        return ((error.square() + 1e-3**2).sqrt() - 1e-3).mean()


def _at(table: Tensor, timesteps: Tensor) -> Tensor:
    return table[timesteps][:, None, None, None]


def train_few_step(settings: Settings) -> None:
    """Distil the pipeline, and save the few-step one.

    >>> train_few_step(settings)
    """
    pipe, digest = load_teacher(settings)
    ids = prompt_ids(settings, pipe.tokenizer)
    with torch.no_grad():
        text = pipe.text_encoder(ids).last_hidden_state
    student = architectures.build_few_step_unet(pipe.unet).to(settings.device)
    consistency = Consistency(pipe, architectures.build_few_step_scheduler())
    compiled = torch.compile(student, dynamic=False, disable=not settings.compile)
    stage = settings.stages["few-step"]
    # At full size only: its teacher has unlearnt half-size pictures.
    latents = scaled_latents(settings, pipe.vae, digest, 128)

    def loss(generator: torch.Generator) -> Tensor:
        with settings.autocast():
            return consistency(compiled, latents, text, stage.batch, generator)

    metadata = settings.metadata | {"pipeline": digest}
    train(stage, student, loss, settings.work / "few-step.pt", metadata)
    pipe.register_modules(unet=student, scheduler=consistency.scheduler)
    with atomic_folder(settings.output / "few-step") as folder:
        pipe.to(torch.float16).save_pretrained(folder)
