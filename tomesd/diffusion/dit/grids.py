"""Token grids that diffusion transformers are told by the shapes of their latents."""

from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit.spec import Grids


def latent_grid(frames: int | None = None, argument: str = "hidden_states") -> Grids:
    """The grid of latents that a model cuts into patches.

    >>> grids = latent_grid(frames=-3)

    frames: the dimension of frames in latents of videos; None for images [..., H, W].
    argument: the one with the latents.
    The size of a patch is read from the model's config: patch_size is a number, (height, width) or
    (frames, height, width), patch_size_t the frames of a patch.
    """

    def grids(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
        shape = given[argument].shape
        time, patch_h, patch_w = _patch(model.config)
        length = 1 if frames is None or len(shape) < 5 else shape[frames] // time
        return ((length, shape[-2] // patch_h, shape[-1] // patch_w),)

    return grids


def _patch(config: Any) -> tuple[Any, ...]:
    """Frames, height and width of a patch."""
    size, time = config.patch_size, getattr(config, "patch_size_t", None) or 1
    sides: tuple[Any, ...] = (size, size) if isinstance(size, int) else tuple(size)
    return sides if len(sides) == 3 else (time, *sides)
