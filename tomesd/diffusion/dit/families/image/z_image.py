"""Z-Image: one stream of image and text tokens; the blocks that refine image tokens merge too."""

from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text
from tomesd.registry import register


def _listed_latents(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """The model is given a list of latents [C, F, H, W]."""
    if isinstance(given["x"][0], list):
        raise ValueError(
            "x must be a list of latents while tokens merge, got lists of latents, whose tokens do "
            "not form one grid"
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
