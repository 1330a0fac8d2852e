"""Train the embedded Shapes models: python scripts/train_shapes.py [--stage all]

Draws the pictures, then trains the autoencoder, the denoiser (UNet and text encoder, first on
half-size pictures, then on whole ones) and the classifier, on a GPU if there is one. Progress is
kept under --work: the same command goes on where it was stopped.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tomesd.shapes import pipeline as shapes
from tomesd.shapes.training import (
    MaskedClassifier,
    Stage,
    autoencoder_loss,
    cached,
    classifier_loss,
    denoiser_loss,
    labelled_pictures,
    pictures,
    to_unit,
    train,
)
from tomesd.shapes.world import HELD_OUT, scene

STAGES = ("autoencoder", "denoiser", "classifier")


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that they are compiled and trained together."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy, timesteps, input_ids):
        text = self.text_encoder(input_ids).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--out", type=Path, default=shapes.ASSETS, help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="checkpoints, data")
    parser.add_argument("--pictures", type=int, default=16384, help="how many to train on")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="times the default steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train compiled: twice as fast after a few minutes of compiling",
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    run = {
        "autoencoder": train_autoencoder,
        "denoiser": train_denoiser,
        "classifier": train_classifier,
    }
    for stage in STAGES if args.stage == "all" else (args.stage,):
        torch.manual_seed(0)
        run[stage](args)


def steps(args, count: int) -> int:
    return max(1, round(count * args.steps_scale))


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def drawn(args, size: int) -> torch.Tensor:
    file = args.work / f"pictures-{size}-{args.pictures}.pt"
    return cached(file, lambda: pictures(range(args.pictures), size))


def train_autoencoder(args) -> None:
    images = drawn(args, 128)
    model = shapes.build_autoencoder().to(args.device)
    stage = Stage("autoencoder", steps(args, 2000), batch=16, lr=2e-3, final=0.01)

    def loss(generator):
        with autocast(args):
            return autoencoder_loss(model, images, stage.batch, generator)

    if args.compile:
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    train(stage, model, loss, args.work / "autoencoder.pt")

    # Scaled so that the latents have unit variance, as the denoiser expects.
    latents = encode(model, images[:1024], args)
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    model.save_pretrained(args.work / "autoencoder")
    held_out = to_unit(pictures(HELD_OUT[: min(256, args.pictures)], 128))
    with torch.no_grad(), autocast(args):
        decoded = torch.cat(
            [
                model.decode(model.encode(batch.to(args.device)).latent_dist.mean).sample.cpu()
                for batch in held_out.split(32)
            ]
        )
    error = (decoded.float().clamp(-1, 1) - held_out).square().mean((1, 2, 3)) / 4
    print(f"autoencoder: {-10 * error.log10().mean():.2f} dB on {len(held_out)} held-out pictures")


def encode(model, images: torch.Tensor, args) -> torch.Tensor:
    """Unscaled latents [n, 4, h, w] of uint8 pictures."""
    with torch.no_grad(), autocast(args):
        return torch.cat(
            [
                model.encode(to_unit(batch.to(args.device))).latent_dist.mean.float().cpu()
                for batch in images.split(64)
            ]
        )


def train_denoiser(args) -> None:
    autoencoder = shapes.AutoencoderKL.from_pretrained(args.work / "autoencoder").to(args.device)
    scale = autoencoder.config.scaling_factor

    def latents(size: int) -> torch.Tensor:
        images = drawn(args, size)
        file = args.work / f"latents-{size}-{args.pictures}.pt"
        made = cached(file, lambda: scale * encode(autoencoder, images, args))
        return made.to(args.device)

    tokenizer = shapes.build_tokenizer()
    prompts = [scene(index).prompt for index in range(args.pictures)]
    ids = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    ids = ids.to(args.device)
    model = Denoiser(shapes.build_text_encoder(tokenizer), shapes.build_unet()).to(args.device)
    compiled = torch.compile(model, dynamic=False, disable=not args.compile)
    for stage, size in (
        (Stage("half-size", steps(args, 4000), batch=32, lr=1.5e-3, final=0.2), 64),
        (Stage("whole", steps(args, 2100), batch=32, lr=1e-3), 128),
    ):
        loss = partial(
            denoiser_loss,
            compiled,
            shapes.build_scheduler(),
            latents(size),
            ids[:-1],
            ids[-1],
            stage.batch,
        )

        def in_precision(generator, loss=loss):
            with autocast(args):
                return loss(generator)

        train(stage, model, in_precision, args.work / f"denoiser-{size}.pt")
    pipeline = shapes.build_pipeline(autoencoder, model.text_encoder, model.unet, tokenizer)
    pipeline.to(torch.float16).save_pretrained(args.out / "pipeline")


def train_classifier(args) -> None:
    model = shapes.build_classifier().to(args.device)
    data = labelled_pictures(args.pictures, model.config, args.work, args.device)
    both = MaskedClassifier(model).to(args.device)
    compiled = torch.compile(both, dynamic=False, disable=not args.compile)
    stage = Stage("classifier", steps(args, 3600), batch=32, lr=1e-3, warmup=300)

    def loss(generator):
        with autocast(args):
            return classifier_loss(compiled, data, stage.batch, generator)

    train(stage, both, loss, args.work / "classifier.pt")
    model.eval()
    held_out = pictures(HELD_OUT[: min(1024, args.pictures)], 128)
    with torch.no_grad():
        read = [
            answer
            for batch in held_out.split(64)
            for answer in shapes.read(model(to_unit(batch).to(args.device)).logits)
        ]
    right = sum(a == scene(i).labels for a, i in zip(read, HELD_OUT, strict=False))
    print(f"classifier: all four right on {right} of {len(read)} held-out pictures")
    model.to(torch.float16).save_pretrained(args.out / "classifier")
    shapes.build_image_processor().save_pretrained(args.out / "classifier")


if __name__ == "__main__":
    main()
