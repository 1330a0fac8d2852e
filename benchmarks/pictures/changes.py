"""How much a picture differs from the one that it would have been without merging."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

from benchmarks.fid.frechet import Features, load_classifier, prepare
from benchmarks.pictures.reference import as_tensor, read
from benchmarks.quality.quality import psnr

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


class ShapesDistance(torch.nn.Module):
    """LPIPS's idea on the embedded classifier, without learned weights: [B], 0 for equal pictures.

    After every layer each token is scaled to length 1; squared distances between the tokens at
    the same place, averaged over places and layers.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier: Any = classifier.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self._tokens(first), self._tokens(second)
        return torch.stack(
            [(x - y).square().sum(-1).mean(-1) for x, y in zip(a, b, strict=True)]
        ).mean(0)

    def _tokens(self, pixels: Tensor) -> list[Tensor]:
        pixels = prepare(pixels, self.classifier)
        states = self.classifier.vit(pixels, output_hidden_states=True).hidden_states
        return [F.normalize(state, dim=-1) for state in states[1:]]


def perceptual(features: Features, device: torch.device) -> Perceptual:
    """The distance that goes with these features.

    Beside InceptionV3 it is LPIPS (VGG16) as torch-fidelity has it, whose weights are downloaded.
    Raises OSError if they cannot be.
    """
    if features.name == "shapes":
        weights = str(features.weights) if features.weights else None
        return ShapesDistance(load_classifier(weights)).to(device)
    return SampleSimilarityLPIPS("lpips-vgg16").to(device)


def changes(
    paths: Sequence[Path],
    unpatched: Sequence[Path],
    distance: Perceptual | None,
    device: torch.device,
    batch: int = 16,
) -> dict[str, float | int | None]:
    """Means over all pictures, each compared with the unpatched one of the same seed.

    psnr is over the pictures that changed at all (it is infinite for the others), `equal` is how
    many did not; psnr is None if none changed. distance: None leaves the perceptual one out.
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
