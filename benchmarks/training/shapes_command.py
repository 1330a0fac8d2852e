"""Train the embedded Shapes models: python scripts/train_shapes.py [--stage all]

Draws the pictures, then trains the autoencoder, the denoiser (UNet and text encoder, first on
half-size pictures, then on whole ones) and the classifier, on a GPU if there is one. With --output
assets they take the place of the embedded ones. Progress is kept under --work: the same command
goes on where it was stopped, and one with other settings wants another --work.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.arguments import number, run_script, script_parser
from benchmarks.common.device import choose_device
from benchmarks.common.files import check_folder
from benchmarks.training.loop import (
    CheckpointError,
    MaskedClassifier,
    Stage,
    autoencoder_loss,
    cached,
    check_checkpoint,
    classifier_loss,
    denoiser_loss,
    labelled_pictures,
    pictures,
    to_unit,
    train,
    atomic_folder,
)
from tomesd.shapes import pipeline as shapes
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


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    chosen = STAGES if args.stage == "all" else (args.stage,)
    try:
        check(args, chosen)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    run = {
        "autoencoder": train_autoencoder,
        "denoiser": train_denoiser,
        "classifier": train_classifier,
    }
    try:
        for stage in chosen:
            torch.manual_seed(0)
            run[stage](args)
    except (CheckpointError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}\nWhat is done stays.")


def check(args: argparse.Namespace, chosen: Sequence[str]) -> None:
    """Raise what can be known to be wrong before any work."""
    args.device = choose_device(args.device)
    for name in ("work", "output"):
        try:
            check_folder(getattr(args, name))
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from error
    if "denoiser" in chosen and "autoencoder" not in chosen and not weights(args).is_file():
        raise FileNotFoundError(
            f"stage denoiser needs {weights(args).parent}, which --stage autoencoder makes"
        )
    for name, stage in schedule(args).items():
        if name.partition("-")[0] in chosen:
            check_checkpoint(args.work / f"{name}.pt", stage, about(args))


def schedule(args: argparse.Namespace) -> dict[str, Stage]:
    """What is trained for how long, by the name of its checkpoint."""

    def steps(count: int) -> int:
        return max(1, round(count * args.steps_scale))

    return {
        "autoencoder": Stage("autoencoder", steps(2000), batch=16, lr=2e-3, final=0.01),
        "denoiser-64": Stage("half-size", steps(4000), batch=32, lr=1.5e-3, final=0.2),
        "denoiser-128": Stage("whole", steps(2100), batch=32, lr=1e-3),
        "classifier": Stage("classifier", steps(3600), batch=32, lr=1e-3, warmup=300),
    }


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What all weights depend on, beside the stage."""
    return {"pictures": args.pictures, "precision": args.precision}


def weights(args: argparse.Namespace) -> Path:
    """The trained autoencoder's."""
    return args.work / "autoencoder" / "diffusion_pytorch_model.safetensors"


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def drawn(args, size: int) -> torch.Tensor:
    file = args.work / f"pictures-{size}-{args.pictures}.pt"
    return cached(file, lambda: pictures(range(args.pictures), size))


def train_autoencoder(args) -> None:
    images = drawn(args, 128)
    model = shapes.build_autoencoder().to(args.device)
    stage = schedule(args)["autoencoder"]

    def loss(generator):
        with autocast(args):
            return autoencoder_loss(model, images, stage.batch, generator)

    if args.compile:
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    train(stage, model, loss, args.work / "autoencoder.pt", about(args))

    # Scaled so that the latents have unit variance, as the denoiser expects.
    latents = encode(model, images[:1024], args)
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    with atomic_folder(args.work / "autoencoder") as folder:
        model.save_pretrained(folder)
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


def latents(args, autoencoder, made_by: str, size: int) -> torch.Tensor:
    """Scaled latents of all pictures; those that another autoencoder made are deleted."""
    name = f"latents-{size}-{args.pictures}-{args.precision}"
    file = args.work / f"{name}-{made_by}.pt"
    for old in set(args.work.glob(f"{name}-*.pt")) - {file}:
        old.unlink()
    images, scale = drawn(args, size), autoencoder.config.scaling_factor
    return cached(file, lambda: scale * encode(autoencoder, images, args)).to(args.device)


def train_denoiser(args) -> None:
    autoencoder = shapes.AutoencoderKL.from_pretrained(weights(args).parent).to(args.device)
    # A pipeline that others get does not name the folder of its maker.
    autoencoder.register_to_config(_name_or_path="")
    made_by = hashlib.sha256(weights(args).read_bytes()).hexdigest()[:12]
    tokenizer = shapes.build_tokenizer()
    prompts = [scene(index).prompt for index in range(args.pictures)]
    ids = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    ids = ids.to(args.device)
    model = Denoiser(shapes.build_text_encoder(tokenizer), shapes.build_unet()).to(args.device)
    compiled = torch.compile(model, dynamic=False, disable=not args.compile)
    for size in (64, 128):
        stage = schedule(args)[f"denoiser-{size}"]
        loss = partial(
            denoiser_loss,
            compiled,
            shapes.build_scheduler(),
            latents(args, autoencoder, made_by, size),
            ids[:-1],
            ids[-1],
            stage.batch,
        )

        def in_precision(generator, loss=loss):
            with autocast(args):
                return loss(generator)

        told = about(args) | {"autoencoder": made_by}
        train(stage, model, in_precision, args.work / f"denoiser-{size}.pt", told)
    pipeline = shapes.build_pipeline(autoencoder, model.text_encoder, model.unet, tokenizer)
    with atomic_folder(args.output / "pipeline") as folder:
        pipeline.to(torch.float16).save_pretrained(folder)


def train_classifier(args) -> None:
    model = shapes.build_classifier().to(args.device)
    data = labelled_pictures(args.pictures, model.config, args.work, args.device)
    both = MaskedClassifier(model).to(args.device)
    compiled = torch.compile(both, dynamic=False, disable=not args.compile)
    stage = schedule(args)["classifier"]

    def loss(generator):
        with autocast(args):
            return classifier_loss(compiled, data, stage.batch, generator)

    train(stage, both, loss, args.work / "classifier.pt", about(args))
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
    with atomic_folder(args.output / "classifier") as folder:
        model.to(torch.float16).save_pretrained(folder)
        shapes.build_image_processor().save_pretrained(folder)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=("all", *STAGES), default="all", help="(%(default)s)")
    add("--pictures", type=number(int, 1, 10**6), default=16384, help="to train on (%(default)s)")
    add("--steps-scale", type=number(float, 1e-4, 100), default=1.0, help="times all steps (1)")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(%(default)s)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train compiled: twice as fast after a few minutes of compiling (yes)",
    )
    add("--work", type=Path, default=Path("runs/shapes"), help="checkpoints, data (%(default)s)")
    add("--output", type=Path, default=Path("runs/shapes/models"), help="models (%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, goes_on=True)
