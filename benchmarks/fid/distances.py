"""Fréchet and kernel distance, precision and recall against a reference set, by torch-fidelity.

On InceptionV3's features the Fréchet distance is called FID. On the embedded classifier's it is not
FID: its values can be compared with each other only.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from tqdm import tqdm

from benchmarks.pictures.reference import FEWEST
from tomesd.shapes import names
from tomesd.shapes import pipeline as shapes

# The size of KID's subsets, as its authors and torch-fidelity have it.
_KID_SUBSET = 1000

# Their names in torch-fidelity.
_EXTRACTORS = {"shapes": "shapes-classifier", "inception": "inception-v3-compat"}


class ShapesFeatures(FeatureExtractorBase):
    """The embedded classifier's features: its class token after the last norm, [B, 64].

    feature_extractor_weights_path: the classifier's folder; None for the embedded one.
    """

    LAYER = "class token"

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (ShapesFeatures.LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return ShapesFeatures.LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        """pixels: [B, 3, H, W], uint8. Returns float64, so that means and covariances are exact."""
        states = self.classifier.vit(prepare(pixels, self.classifier)).last_hidden_state
        return (states[:, 0].double(),)


def load_classifier(folder: str | None):
    """A ViT of the Shapes world in float32; the embedded one for None."""
    model = shapes.load_classifier(Path(folder)) if folder else shapes.load_classifier()
    return model.float()


def prepare(pixels: Tensor, classifier) -> Tensor:
    """Pictures [B, 3, H, W] of uint8, scaled and normalized as the classifier expects."""
    side = classifier.config.image_size
    pixels = pixels.float()
    if pixels.shape[-2:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return pixels / 127.5 - 1


torch_fidelity.register_feature_extractor(_EXTRACTORS["shapes"], ShapesFeatures)


@dataclass(frozen=True)
class Features:
    """Which network's features the distances are taken on.

    >>> Features("shapes").distance
    'Fréchet distance on Shapes features'

    name: "shapes" or "inception". weights: the classifier's folder, or InceptionV3's weights file
        in torch-fidelity's format; None for the embedded classifier, or to download InceptionV3's.
    """

    name: str
    weights: Path | None = None

    @property
    def distance(self) -> str:
        return "FID" if self.name == "inception" else "Fréchet distance on Shapes features"

    @property
    def kernel(self) -> str:
        return "KID" if self.name == "inception" else "kernel distance"

    @property
    def perceptual(self) -> str:
        """The name of the perceptual distance between two pictures."""
        return "LPIPS" if self.name == "inception" else "token distance on Shapes features"

    @property
    def width(self) -> int:
        """The number of features of a picture."""
        return 2048 if self.name == "inception" else 64

    @property
    def source(self) -> Path | None:
        """The file or folder of the weights; None if they are downloaded."""
        if self.weights is None and self.name == "shapes":
            return names.ASSETS / "classifier"
        return self.weights

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError if the weights are not those of this network."""
        if self.name == "shapes":
            try:
                classifier = load_classifier(str(self.weights) if self.weights else None)
            except FileNotFoundError:
                raise
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(f"classifier {self.source} cannot be read: {error}") from error
            if classifier.num_labels != sum(map(len, shapes.LABELS.values())):
                raise ValueError(f"classifier {self.source} is not one of the Shapes world")
        elif self.weights is not None:
            _check_inception(self.weights)


def _check_inception(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"inception weights: there is no file {path}")
    expected = "inception weights must be a file of torch-fidelity's InceptionV3"
    try:
        # torch-fidelity unpickles the file; with weights_only it can contain tensors only.
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{expected}, got {path}: {reason}") from error
    shape = getattr(weights.get("fc.weight"), "shape", None) if isinstance(weights, dict) else None
    if shape != (1008, 2048) or "Mixed_7c.branch_pool.conv.weight" not in weights:
        raise ValueError(f"{expected}, got {path} with other tensors")


def distances(
    pictures: Dataset,
    reference: Dataset,
    features: Features,
    cache: Path,
    reference_name: str,
    device: torch.device,
    batch: int = 32,
) -> dict[str, float]:
    """Fréchet distance, KID, precision and recall of pictures against a reference set.

    >>> distances(pictures, drawn, Features("shapes"), Path("cache"), "drawn", device)["frechet"]

    pictures, reference: datasets of uint8 tensors [3, H, W], at least FEWEST each.
    cache, reference_name: the folder and the name under which the reference's features are kept;
        another reference, or other weights, need another name.
    precision: the share of pictures inside the reference's manifold; recall: vice versa.
    Raises ValueError for fewer pictures than FEWEST.
    """
    count = min(len(pictures), len(reference))  # type: ignore[arg-type]
    if count < FEWEST:
        raise ValueError(f"there must be {FEWEST} pictures or more in both sets, got {count}")
    found = _calculate(
        features,
        device,
        input1=pictures,
        input2=reference,
        input2_cache_name=reference_name,
        cache_root=str(cache),
        kid=True,
        prc=True,
        kid_subset_size=min(_KID_SUBSET, count),
        batch_size=batch,
    )
    return {
        "frechet": found[torch_fidelity.KEY_METRIC_FID],
        "kid": found[torch_fidelity.KEY_METRIC_KID_MEAN],
        "precision": found[torch_fidelity.KEY_METRIC_PRECISION],
        "recall": found[torch_fidelity.KEY_METRIC_RECALL],
    }


def cache_reference(
    reference: Dataset,
    features: Features,
    cache: Path,
    reference_name: str,
    device: torch.device,
    batch: int = 32,
) -> float:
    """Compute the reference's features for `distances`; returns its distance to itself.

    >>> cache_reference(drawn, Features("shapes"), Path("cache"), "drawn", device)
    0.0

    Raises BrokenPictureError for a picture that cannot be read, and OSError if weights cannot be
    downloaded.
    """
    watched = _WithProgress(reference)
    found = _calculate(
        features,
        device,
        input1=watched,
        input2=watched,
        input1_cache_name=reference_name,
        input2_cache_name=reference_name,
        cache_root=str(cache),
        batch_size=batch,
    )
    watched.bar.close()
    return found[torch_fidelity.KEY_METRIC_FID]


def _calculate(features: Features, device: torch.device, **inputs: Any) -> dict[str, float]:
    # torch-fidelity supports CUDA and the CPU.
    is_cuda = device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else nullcontext():
        return torch_fidelity.calculate_metrics(
            fid=True,
            feature_extractor=_EXTRACTORS[features.name],
            feature_extractor_weights_path=str(features.weights) if features.weights else None,
            cuda=is_cuda,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
            **inputs,
        )


class _WithProgress(Dataset):
    """Shows a progress bar; torch-fidelity's own one prints much else."""

    def __init__(self, pictures: Dataset) -> None:
        self.pictures = pictures
        self.bar = tqdm(total=len(pictures), desc="reference", unit="picture", delay=1)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.pictures)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        self.bar.update(index + 1 - self.bar.n)
        return self.pictures[index]
