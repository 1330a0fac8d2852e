"""How much pictures differ from the unpatched ones of the same seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from benchmarks.pictures.reference import as_tensor, read
from tomesd.pictures.differences import psnr

Perceptual = Callable[[Tensor, Tensor], Tensor]


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity, 1 for equal pictures, with the window of its authors (σ = 1.5).

    >>> ssim(picture, picture)
    1.0
    """
    return float(
        structural_similarity(
            np.asarray(image),
            np.asarray(reference),
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
    )


def differences(
    paths: Sequence[Path],
    unpatched: Sequence[Path],
    distance: Perceptual | None,
    device: torch.device,
    batch: int = 16,
) -> dict[str, float | int | None]:
    """Means over all pictures, each compared with the unpatched one of the same seed.

    >>> differences(paths, unpatched, None, torch.device("cpu"))["psnr"]
    32.6

    psnr: over the pictures that changed at all (it is infinite for the others); None if none did.
    equal: how many did not change. distance: None leaves the perceptual one out.
    Raises BrokenPictureError.
    """
    ratios, similarities, far = [], [], []
    for start in range(0, len(paths), batch):
        pairs = [
            (read(path), read(other))
            for path, other in zip(
                paths[start : start + batch], unpatched[start : start + batch], strict=True
            )
        ]
        ratios += [psnr(*pair) for pair in pairs]
        similarities += [ssim(*pair) for pair in pairs]
        if distance is not None:
            first, second = (
                torch.stack([as_tensor(pair[side]) for pair in pairs]).to(device) for side in (0, 1)
            )
            with torch.no_grad():
                far += distance(first, second).flatten().tolist()
    changed = [ratio for ratio in ratios if np.isfinite(ratio)]
    return {
        "psnr": fmean(changed) if changed else None,
        "ssim": fmean(similarities),
        "perceptual": fmean(far) if far else None,
        "equal": len(ratios) - len(changed),
    }
