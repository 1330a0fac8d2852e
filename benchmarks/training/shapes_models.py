"""Training the Shapes models: the autoencoder, the denoiser and the classifier."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn

from benchmarks.common.files import atomic_folder
from benchmarks.training import architectures
from benchmarks.training.data import cached, draw_pictures, labelled_pictures, to_unit
from benchmarks.training.loop import Stage, train
from benchmarks.training.losses import (
    MaskedClassifier,
    autoencoder_loss,
    classifier_loss,
    denoiser_loss,
    noisy_batch,
)
from tomesd.shapes import names
from tomesd.shapes import pipeline as shapes
from tomesd.shapes.world import HELD_OUT, scene


@dataclass(frozen=True)
class Settings:
    """What all three models have in common.

    >>> settings = Settings(16384, 1.0, torch.device("cuda"), "bf16", True, work, output)

    pictures: how many to train on. steps_scale: multiplies all steps. work: the folder of
    checkpoints and data; output: of the trained models.
    """

    pictures: int
    steps_scale: float
    device: torch.device
    precision: str
    compile: bool
    work: Path
    output: Path

    @property
    def stages(self) -> dict[str, Stage]:
        """Every stage of training by the name of its checkpoint."""

        def steps(count: int) -> int:
            return max(1, round(count * self.steps_scale))

        return {
            "autoencoder": Stage("autoencoder", steps(2000), batch=16, lr=2e-3, final=0.01),
            "denoiser-64": Stage("half-size", steps(4000), batch=32, lr=1.5e-3, final=0.2),
            "denoiser-128": Stage("full-size", steps(2100), batch=32, lr=1e-3),
            "transformer-64": Stage("half-size", steps(3000), batch=32, lr=1.5e-3, final=0.2),
            "transformer-128": Stage("full-size", steps(600), batch=32, lr=6e-4),
            "few-step": Stage("few-step", steps(800), batch=6, lr=3e-4, warmup=50),
            "classifier": Stage("classifier", steps(3600), batch=32, lr=1e-3, warmup=300),
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """What all weights depend on beside the stage."""
        return {"pictures": self.pictures, "precision": self.precision}

    @property
    def autoencoder_weights(self) -> Path:
        return self.work / "autoencoder" / "diffusion_pytorch_model.safetensors"

    @property
    def teacher(self) -> Path:
        """The pipeline that few-step and transformer build on: the one in `output`, else the
        embedded one."""
        own = self.output / "pipeline"
        return own if own.is_dir() else names.ASSETS / "pipeline"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def images(self, size: int) -> Tensor:
        """The training pictures, drawn once."""
        file = self.work / f"pictures-{size}-{self.pictures}.pt"
        return cached(file, lambda: draw_pictures(range(self.pictures), size))


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, to compile and train them together."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        text = self.text_encoder(input_ids).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def train_autoencoder(settings: Settings) -> None:
    """Train the autoencoder, save it, and print its PSNR on held-out pictures.

    >>> train_autoencoder(settings)
    """
    images = settings.images(128)
    model = architectures.build_autoencoder().to(settings.device)
    stage = settings.stages["autoencoder"]

    def loss(generator: torch.Generator) -> Tensor:
        with settings.autocast():
            return autoencoder_loss(model, images, stage.batch, generator)

    if settings.compile:
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    train(stage, model, loss, settings.work / "autoencoder.pt", settings.metadata)

    # Scaled so that the latents have unit variance, as the denoiser expects.
    latents = encode(model, images[:1024], settings)
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    with atomic_folder(settings.work / "autoencoder") as folder:
        model.save_pretrained(folder)
    held_out = to_unit(draw_pictures(HELD_OUT[: min(256, settings.pictures)], 128))
    with torch.no_grad(), settings.autocast():
        decoded = torch.cat(
            [
                model.decode(model.encode(batch.to(settings.device)).latent_dist.mean).sample.cpu()
                for batch in held_out.split(32)
            ]
        )
    error = (decoded.float().clamp(-1, 1) - held_out).square().mean((1, 2, 3)) / 4
    print(f"autoencoder: {-10 * error.log10().mean():.2f} dB on {len(held_out)} held-out pictures")


def encode(model: Any, images: Tensor, settings: Settings) -> Tensor:
    """Unscaled latents [n, 4, h, w] of uint8 pictures."""
    with torch.no_grad(), settings.autocast():
        return torch.cat(
            [
                model.encode(to_unit(batch.to(settings.device))).latent_dist.mean.float().cpu()
                for batch in images.split(64)
            ]
        )


def scaled_latents(settings: Settings, autoencoder: Any, digest: str, size: int) -> Tensor:
    """Scaled latents of all pictures; cached ones of another autoencoder are deleted."""
    name = f"latents-{size}-{settings.pictures}-{settings.precision}"
    file = settings.work / f"{name}-{digest}.pt"
    for old in set(settings.work.glob(f"{name}-*.pt")) - {file}:
        old.unlink()
    images, scale = settings.images(size), autoencoder.config.scaling_factor
    latents = cached(file, lambda: scale * encode(autoencoder, images, settings))
    return latents.to(settings.device)


def load_teacher(settings: Settings) -> tuple[StableDiffusionPipeline, str]:
    """The trained pipeline that other models start from, and a digest of its weights."""
    pipe = shapes.load_pipeline(settings.teacher).to(settings.device)
    files = sorted(settings.teacher.rglob("*.safetensors"))
    for part in (pipe, pipe.vae, pipe.unet):
        # The published pipelines must not name a folder of this machine.
        part.register_to_config(_name_or_path="")
    return pipe, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def prompt_ids(settings: Settings, tokenizer: Any) -> Tensor:
    """The tokens of each picture's prompt [pictures + 1, 16]; the last is the empty prompt."""
    prompts = [scene(index).prompt for index in range(settings.pictures)]
    ids = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    return ids.to(settings.device)


def train_denoiser(settings: Settings) -> None:
    """Train text encoder and UNet, at half size and then at full size; save the pipeline.

    >>> train_denoiser(settings)
    """
    weights = settings.autoencoder_weights
    autoencoder = AutoencoderKL.from_pretrained(weights.parent).to(settings.device)
    # The published pipeline must not name a folder of this machine.
    autoencoder.register_to_config(_name_or_path="")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    tokenizer = architectures.build_tokenizer()
    ids = prompt_ids(settings, tokenizer)
    model = Denoiser(architectures.build_text_encoder(tokenizer), architectures.build_unet())
    model = model.to(settings.device)
    compiled = torch.compile(model, dynamic=False, disable=not settings.compile)
    for size in (64, 128):
        stage = settings.stages[f"denoiser-{size}"]
        latents = scaled_latents(settings, autoencoder, digest, size)
        draw = partial(
            noisy_batch, architectures.build_scheduler(), latents, ids[:-1], ids[-1], stage.batch
        )

        def in_precision(generator: torch.Generator, draw: Any = draw) -> Tensor:
            with settings.autocast():
                return denoiser_loss(compiled, draw(generator))

        metadata = settings.metadata | {"autoencoder": digest}
        train(stage, model, in_precision, settings.work / f"denoiser-{size}.pt", metadata)
    pipeline = architectures.build_pipeline(autoencoder, model.text_encoder, model.unet, tokenizer)
    with atomic_folder(settings.output / "pipeline") as folder:
        pipeline.to(torch.float16).save_pretrained(folder)


def train_classifier(settings: Settings) -> None:
    """Train the classifier, save it, and print its accuracy on held-out pictures.

    >>> train_classifier(settings)
    """
    model = architectures.build_classifier().to(settings.device)
    data = labelled_pictures(settings.pictures, model.config, settings.work, settings.device)
    both = MaskedClassifier(model).to(settings.device)
    compiled = torch.compile(both, dynamic=False, disable=not settings.compile)
    stage = settings.stages["classifier"]

    def loss(generator: torch.Generator) -> Tensor:
        with settings.autocast():
            return classifier_loss(compiled, data, stage.batch, generator)

    train(stage, both, loss, settings.work / "classifier.pt", settings.metadata)
    model.eval()
    held_out = draw_pictures(HELD_OUT[: min(1024, settings.pictures)], 128)
    with torch.no_grad():
        answers = [
            answer
            for batch in held_out.split(64)
            for answer in shapes.read(model(to_unit(batch).to(settings.device)).logits)
        ]
    correct = sum(a == scene(i).labels for a, i in zip(answers, HELD_OUT, strict=False))
    print(f"classifier: all four correct on {correct} of {len(answers)} held-out pictures")
    with atomic_folder(settings.output / "classifier") as folder:
        model.to(torch.float16).save_pretrained(folder)
        architectures.build_image_processor().save_pretrained(folder)
