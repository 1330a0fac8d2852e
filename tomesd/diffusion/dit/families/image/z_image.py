"""Z-Image and Fibo 2: one stream of image and text; the blocks that refine the image merge too.

The text of Fibo 2 comes first, or last if some samples have less of it. Its reference images follow
the image itself, and merge each within itself.
"""

from dataclasses import replace
from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import refuse, register


def _listed_latents(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """The model is given a list of latents [C, F, H, W]."""
    if isinstance(given["x"][0], list):
        raise ValueError(
            "x must be a list of latents while tokens merge, got lists of latents, as "
            "ZImageOmniPipeline gives them: their tokens do not form one grid"
        )
    sizes = {tuple(x.shape[-3:]) for x in given["x"]}
    if len(sizes) != 1:
        raise ValueError(f"x must list latents of one size while tokens merge, got {sorted(sizes)}")
    ((frames, h, w),) = sizes
    patch, time = given.get("patch_size", 2), given.get("f_patch_size", 1)
    return ((frames // time, h // patch, w // patch),)


def _blocks(name: str) -> Blocks:
    return Blocks(
        name,
        tokens="x",
        text=Text(first=False),
        attention=("attention",),
        proportional=Bias(4),
        rotary=Rotary("freqs_cis", dim=1),
        mask="attn_mask",
    )


register(
    DiT((_blocks("noise_refiner"), _blocks("layers")), _listed_latents, timestep="t"),
    "diffusers.ZImageTransformer2DModel",
)
refuse(
    "it puts texts, images and their features into one sequence, each with a timestep of its own; "
    "ZImagePipeline, ZImageImg2ImgPipeline and ZImageInpaintPipeline merge",
    "diffusers.ZImageOmniPipeline",
)


_own = latent_grid()


def _own_and_references(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    own, patch = _own(model, given), model.config.patch_size
    shapes = [latents.shape for latents in given.get("context_latents") or []]
    return own + tuple((1, shape[2] // patch, shape[3] // patch) for shape in shapes)


_REFINER = Blocks(
    "noise_refiner",
    tokens="x",
    attention=("attention",),
    proportional=Bias(4),
    rotary=Rotary("freqs_cis", dim=1),
    # The tokens of references are modulated as clean ones.
    per_token=(("noise_mask", 1),),
)
register(
    DiT(
        (
            _REFINER,
            replace(_REFINER, name="layers", text=Text(last_with="attn_mask"), mask="attn_mask"),
        ),
        _own_and_references,
    ),
    "diffusers.BriaFibo2Transformer2DModel",
)
