"""Making pictures with a text-to-image pipeline: the embedded one, or any other.

diffusers takes seconds to import, so it is imported where a pipeline is loaded: errors for wrong
options come at once.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tomesd.pictures.names import SCHEDULERS
from tomesd.shapes import names


@dataclass(frozen=True)
class Sampling:
    """How a picture is sampled.

    >>> Sampling(steps=25, guidance=4.0, width=128, height=128).steps
    25

    width, height: pixels; None for the size that the model was made for.
    """

    steps: int
    guidance: float
    width: int | None = None
    height: int | None = None


# What the embedded pipeline looks best with.
EMBEDDED = Sampling(names.PIPELINES[names.DEFAULT].steps, names.PIPELINES[names.DEFAULT].guidance)


def embedded_folder(model: str | None) -> Path | None:
    """The folder of an embedded pipeline, by name (None: the default one); None for other models.

    >>> embedded_folder("few-step").name
    'few-step'
    """
    embedded = names.PIPELINES.get(model or names.DEFAULT)
    return None if embedded is None else names.ASSETS / embedded.folder


def check_model(model: str | None) -> None:
    """Check a model's name without loading anything.

    >>> check_model("stable-diffusion-v1-5/stable-diffusion-v1-5")

    Raises ValueError for what is neither an embedded pipeline, nor a folder with a pipeline, nor a
    possible hub id, and FileNotFoundError if the embedded pipeline is missing.
    """
    folder = embedded_folder(model)
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing, which `python scripts/train_shapes.py` makes; embedded are "
                f"{', '.join(names.available()) or 'none'}"
            )
        return
    assert model is not None
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise ValueError(
                f"model must be a pipeline's folder, got {model!r}: no model_index.json"
            )
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(
            f"model must be {', '.join(names.available())}, a folder or a hub id, got {model!r}"
        ) from error


def load_pipeline(
    model: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    scheduler: str | None = None,
    from_image: bool = False,
) -> Any:
    """A pipeline that makes an image of a prompt, on a device.

    >>> pipe = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", "cuda", torch.float16)

    model: the name of an embedded pipeline (`tomesd.shapes.names.available`; None: the default
        one), a folder in diffusers' format, or an id on the Hugging Face hub.
    scheduler: one of SCHEDULERS, with the noise schedule that the model was trained on; None for
        the pipeline's own.
    from_image: the pipeline starts with an image (img2img).
    Raises ValueError for an unknown scheduler or what cannot be a model, and OSError if it cannot
    be read or downloaded.
    """
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    check_model(model)
    import diffusers

    folder = embedded_folder(model)
    if folder is not None:
        from tomesd.shapes import pipeline as shapes

        pipe: Any = shapes.load_pipeline(folder, dtype=dtype)
    else:
        try:
            pipe = diffusers.AutoPipelineForText2Image.from_pretrained(model, dtype=dtype)
        except OSError as error:
            embedded = ", ".join(names.available())
            raise OSError(
                f"model {model!r} cannot be loaded (embedded are {embedded}): {error}"
            ) from error
    if from_image:
        pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe, dtype=dtype)
    if scheduler is not None:
        name, settings = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    # Half precision on the CPU is slow, but not impossible, as the warning says.
    return pipe.to(device, silence_dtype_warnings=True)


def choose(
    pipe: Any,
    model: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> Sampling:
    """How to sample with a pipeline; what is not given is the pipeline's default.

    >>> choose(pipe, guidance=7.5).steps
    25

    model: as for `load_pipeline`. size: width and height.
    """
    embedded = names.PIPELINES.get(model or names.DEFAULT)
    if embedded is not None:
        usual = Sampling(embedded.steps, embedded.guidance)
    else:
        call = inspect.signature(pipe.__call__).parameters
        usual = Sampling(call["num_inference_steps"].default, call["guidance_scale"].default)
    width, height = size or (None, None)
    return Sampling(
        steps=usual.steps if steps is None else steps,
        guidance=usual.guidance if guidance is None else guidance,
        width=width,
        height=height,
    )


def native_side(pipe: Any) -> int:
    """The side in pixels of the pictures that a pipeline was trained on.

    >>> native_side(StableDiffusionXLPipeline.from_pretrained("stabilityai/sdxl-turbo"))
    512

    Raises ValueError if neither its UNet or transformer nor the pipeline itself has one.
    """
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    # A transformer with rotary positions, such as Flux, has no size of its own.
    latents = getattr(getattr(denoiser, "config", None), "sample_size", None)
    latents = latents or getattr(pipe, "default_sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    if not (isinstance(latents, int) and isinstance(scale, int)):
        raise ValueError(
            f"size must be given for {type(pipe).__name__}, pixels, one side or WxH: the pipeline "
            "has neither sample_size nor default_sample_size"
        )
    return latents * scale


def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batch: int = 1,
    **more: Any,
) -> Iterator[Image.Image]:
    """One picture for each prompt and seed, as soon as it is finished.

    >>> pictures = list(sample(pipe, ["a red heart", "a blue star"], [0, 1], Sampling(25, 4.0)))

    seeds: a picture's noise depends on its own seed alone and is drawn on the CPU. So it is the
        same on every device and in any batch, up to the rounding of matrix products.
    batch: how many are sampled at once. 1 needs the least memory.
    more: further arguments of the pipeline, such as image and strength.
    Raises ValueError if there are not as many seeds as prompts or batch is below 1, and
    FloatingPointError for a picture that overflowed, which would be black.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"there must be as many seeds as prompts, got {len(prompts)} and {len(seeds)}"
        )
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    # Pipelines that start with an image take its size and have no such arguments.
    size = {"width": sampling.width, "height": sampling.height}
    return _sample(
        pipe, prompts, seeds, sampling, batch, {k: v for k, v in size.items() if v} | more
    )


def _sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batch: int,
    more: dict[str, Any],
) -> Iterator[Image.Image]:
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pixels = pipe(
            list(prompts[part]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="np",
            **more,
        ).images
        if not np.isfinite(pixels).all():
            raise FloatingPointError(
                f"the image is not finite in {pipe.dtype} with {type(pipe.scheduler).__name__}: "
                "use a precision with more range (bf16, fp32) or another scheduler"
            )
        yield from pipe.numpy_to_pil(pixels)
