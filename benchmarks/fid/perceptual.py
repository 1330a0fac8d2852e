"""The perceptual distance between two pictures: LPIPS, or the same idea on Shapes features."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

from benchmarks.fid.distances import Features, load_classifier, prepare
from benchmarks.pictures.differences import Perceptual


class ShapesDistance(torch.nn.Module):
    """LPIPS's idea on the embedded classifier, without learned weights: [B], 0 for equal pictures.

    After every layer tokens are normalized; squared distances between tokens at the same place,
    averaged over places and layers.
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

    >>> distance = perceptual(Features("shapes"), torch.device("cpu"))

    For InceptionV3 it is torch-fidelity's LPIPS (VGG16), whose weights are downloaded.
    Raises OSError if they cannot be.
    """
    if features.name == "shapes":
        weights = str(features.weights) if features.weights else None
        return ShapesDistance(load_classifier(weights)).to(device)
    return SampleSimilarityLPIPS("lpips-vgg16").to(device)
