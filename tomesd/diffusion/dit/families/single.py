"""One stream of image and text tokens from the first block to the last: Lumina 2 and Z-Image.

Their first few blocks refine the image's tokens and the text's apart; those of the image merge too.
"""

from typing import Any

from tomesd.diffusion.dit.record import Blocks, Family, Grid, image_grid


def _listed_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """Z-Image is given a list of latents [C, F, H, W]."""
    if isinstance(given["x"][0], list):
        raise ValueError(
            "x must list latents while tokens merge, got lists of latents: their tokens are not in "
            "one grid"
        )
    sizes = {tuple(x.shape[-3:]) for x in given["x"]}
    if len(sizes) != 1:
        raise ValueError(f"x must list latents of one size while tokens merge, got {sorted(sizes)}")
    ((frames, h, w),) = sizes
    patch, together = given.get("patch_size", 2), given.get("f_patch_size", 1)
    return ((frames // together, h // patch, w // patch),)


# Its processor takes no bias, and samples have texts of their own lengths.
_LUMINA = Blocks("layers", together=True, rotary="image_rotary_emb", rotary_dim=1)
_ZIMAGE = Blocks(
    "layers",
    tokens="x",
    together=True,
    image_first=True,
    attention=("attention",),
    bias=4,
    mask="attn_mask",
    rotary="freqs_cis",
    rotary_dim=1,
)

FAMILIES = (
    Family(
        ("Lumina2Transformer2DModel",),
        (_LUMINA._replace(where="noise_refiner"), _LUMINA),
        image_grid,
    ),
    Family(
        ("ZImageTransformer2DModel",),
        (_ZIMAGE._replace(where="noise_refiner"), _ZIMAGE),
        _listed_grid,
        timestep="t",
    ),
)

REFUSED: dict[str, str] = {}
