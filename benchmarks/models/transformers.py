"""A few full-size blocks of SD3, SD3.5 and Flux, with random weights.

All blocks of such a model have the same tokens, so the speedup of a few of them is that of all. All
of Flux would take 48 GB and many minutes for a forward on one core of a CPU. Embeddings and the
last layer are complete; their time is negligible.
"""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.models import unets
from benchmarks.models.unets import Denoiser, Level, noise

# Stable Diffusion 3 medium: 2,028,328,000 parameters.
SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

# Flux.1 dev: 11,901,408,320 parameters.
FLUX: dict[str, Any] = {"guidance_embeds": True}

# Stable Diffusion 3.5 medium: 2,243,171,520 parameters. Its first blocks have a second attention,
# of image tokens alone.
SD35: dict[str, Any] = SD3 | {
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 384,
}

# The pipelines' defaults: of SD3 CLIP's with 256 of T5's, of Flux T5's alone.
TEXT_TOKENS = {"sd3": 77 + 256, "flux": 512}

# Side of a token in pixels: patches of 2×2 latents of 8×8 pixels.
PIXELS = 16


class _Kind(NamedTuple):
    """A class of models.

    counts: the settings with the number of blocks in each list. blocks: default number in each
    list; a forward at 1024 px takes seconds on a CPU, and the weights fit easily.
    """

    counts: tuple[str, ...]
    text_tokens: int
    batch: int
    blocks: int


_KINDS = {
    "SD3Transformer2DModel": _Kind(("num_layers",), TEXT_TOKENS["sd3"], batch=2, blocks=2),
    "FluxTransformer2DModel": _Kind(
        ("num_layers", "num_single_layers"),
        TEXT_TOKENS["flux"],
        batch=1,
        blocks=1,
    ),
}
_KNOWN = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35": ("SD3Transformer2DModel", SD35),
    "flux": ("FluxTransformer2DModel", FLUX),
}


@dataclass(frozen=True, kw_only=True)
class Transformer(Denoiser):
    """A diffusion transformer with some of its blocks; sizes are in tokens, not latents.

    >>> denoiser("flux").config["num_layers"]
    1

    class_name: in diffusers. text_tokens: its pipeline's default.
    """

    class_name: str
    text_tokens: int

    @property
    def largest(self) -> int | None:
        tokens = self.config.get("pos_embed_max_size")  # Rotary positions are unlimited.
        return None if tokens is None else tokens * PIXELS

    def empty(self) -> Any:
        with torch.device("meta"):
            return _class(self.class_name).from_config(self.config).eval().requires_grad_(False)

    def inputs(
        self, batch: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[tuple, dict[str, Any]]:
        """Arguments of one forward on size×size tokens, from noise: (args, kwargs).

        >>> flux = denoiser("flux")
        >>> args, kwargs = flux.inputs(1, 64, torch.device("cpu"), torch.float32)
        >>> kwargs["hidden_states"].shape
        torch.Size([1, 4096, 64])
        """
        config = self.config
        is_flux = self.class_name == "FluxTransformer2DModel"
        # Flux's pipeline packs the latents into patches.
        shape = (size * size,) if is_flux else (2 * size, 2 * size)
        shape = (*shape, config["in_channels"]) if is_flux else (config["in_channels"], *shape)
        text = (batch, self.text_tokens, config["joint_attention_dim"])
        pooled = (batch, config["pooled_projection_dim"])
        kwargs: dict[str, Any] = {
            "hidden_states": noise((batch, *shape), device, dtype),
            "encoder_hidden_states": noise(text, device, dtype),
            "pooled_projections": noise(pooled, device, dtype),
            # Of 1000 steps; Flux's timesteps are from 0 to 1.
            "timestep": torch.full((batch,), 0.5 if is_flux else 500.0, device=device, dtype=dtype),
            "return_dict": False,
        }
        if is_flux:
            rows = torch.arange(size * size, device=device) // size
            columns = torch.arange(size * size, device=device) % size
            ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(dtype)
            kwargs["img_ids"] = ids
            kwargs["txt_ids"] = torch.zeros(self.text_tokens, 3, device=device, dtype=dtype)
            if config["guidance_embeds"]:
                kwargs["guidance"] = torch.full((batch,), 3.5, device=device, dtype=dtype)
        return (), kwargs

    def levels(self, size: int) -> list[Level]:
        """One level: all blocks have the same tokens."""
        channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        blocks = sum(self.config[count] for count in _KINDS[self.class_name].counts)
        return [Level(size, size, channels, blocks)]


def denoiser(model: str, blocks: int | None = None) -> Denoiser:
    """The configuration of a known model or a folder: a transformer with a few blocks, or a UNet.

    >>> denoiser("sd3", blocks=4).name
    'sd3 with 4 blocks'

    model: "sd15", "sdxl", "sd3", "sd35" (medium), "flux", or a folder in diffusers' format, a
        pipeline or its denoiser alone, of which only the configuration is read.
    blocks: how many of a transformer's first blocks to keep in each of its lists of blocks, in Flux
        joint and single-stream ones. By default 2, for Flux 1.
    Raises FileNotFoundError if the folder has no configuration, and ValueError if it is of another
    model, if the model has fewer blocks, or if blocks is given for a UNet.
    """
    found = _KNOWN.get(model) or _in_folder(Path(model))
    if found is None:
        if blocks is not None:
            raise ValueError(
                f"blocks must not be given for {model!r}: a UNet's blocks are all different, only "
                "transformers can run with some of theirs"
            )
        try:
            return unets.denoiser(model)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"model must be sd15, sdxl, {', '.join(_KNOWN)} or a folder with config.json, "
                f"unet/config.json or transformer/config.json, got {model!r}"
            ) from error
    name, config = found
    kind, model_class = _KINDS[name], _class(name)
    signature = inspect.signature(model_class.__init__).parameters
    available = [config.get(count, signature[count].default) for count in kind.counts]
    if blocks is not None and not 1 <= blocks <= min(available):
        raise ValueError(
            f"blocks must be from 1 to {min(available)}, the model's number, got {blocks}"
        )
    kept = [min(blocks or kind.blocks, count) for count in available]
    title = model if model in _KNOWN else Path(model).resolve().name
    with torch.device("meta"):  # Adds the defaults that the configuration leaves out.
        complete = model_class.from_config(
            config | dict(zip(kind.counts, kept, strict=True))
        ).config
    return Transformer(
        f"{title} with {' + '.join(map(str, kept))} blocks",
        dict(complete),
        PIXELS,
        size=1024,
        batch=kind.batch,
        class_name=name,
        text_tokens=kind.text_tokens,
    )


def _class(name: str) -> Any:
    import diffusers  # Late: the import takes seconds, and --help does not need it.

    return getattr(diffusers, name)


def _in_folder(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The class and configuration of a folder's transformer, if it is one of _KINDS."""
    for file in (folder / "transformer" / "config.json", folder / "config.json"):
        if file.is_file():
            config = json.loads(file.read_text())
            if config.get("_class_name") in _KINDS:
                return config["_class_name"], config
    return None
