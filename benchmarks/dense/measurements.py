"""How close merged models stay to themselves: angles of merged tokens, merging within blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

import tomesd
from benchmarks.training.losses import split_logits
from tomesd import registry
from tomesd.core.token_map import TokenMap
from tomesd.vit import ViTPatch
from tomesd.vit.rotary import Rotary
from tomesd.vit.settings import ViTSettings

# The pictures of the rotary model: 8×8 patches, so that it trains in minutes.
SIDE = 64


class MeanAngle(Rotary):
    """A merged token takes the mean of its members' sines and cosines: that of their rotations."""

    def pick(self, table: Tensor, so_far: TokenMap, leading: int) -> Tensor:
        return so_far.merge(F.pad(table[:, 0], (0, 0, leading, 0)))[:, None, leading:]


class MeanDirection(MeanAngle):
    """The same, of length one again: an angle."""

    def pick(self, table: Tensor, so_far: TokenMap, leading: int) -> Tensor:
        sin, cos = super().pick(table, so_far, leading).chunk(2, dim=-1)
        length = torch.hypot(sin, cos).clamp(min=1e-6)
        return torch.cat([sin / length, cos / length], dim=-1)


ANGLES: dict[str, type[Rotary]] = {
    "of its head": Rotary,
    "mean of the rotations": MeanAngle,
    "mean angle": MeanDirection,
}


class RotaryClassifier(nn.Module):
    """A small Eva with rotary positions alone, for the Shapes world: class and mask logits."""

    def __init__(self, labels: int, cells: int):
        super().__init__()
        self.eva = Eva(
            img_size=SIDE,
            patch_size=8,
            embed_dim=64,
            depth=4,
            num_heads=2,
            num_classes=labels,
            global_pool="token",
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
        )
        self.mask_head = nn.Linear(64, cells**2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.eva.forward_features(pixels)
        return self.eva.forward_head(tokens), self.mask_head(tokens[:, 1:])


@contextmanager
def rotated_by(model: Any, angles: type[Rotary], r: int) -> Iterator[None]:
    """Merge with other angles than the library's."""
    spec: Any = registry.find(model)
    patch = ViTPatch(replace(spec, rotary=angles("rope")), model, ViTSettings(r=r))
    patch.install()
    try:
        yield
    finally:
        patch.remove()


@torch.no_grad()
def compared(
    call: Callable[[Tensor], tuple[Tensor, Tensor]], pixels: Tensor, labels: Tensor, batch: int
) -> tuple[Tensor, float]:
    """Patch features [n, patches, C] of all pictures, and the share of labels that are right.

    call: gives patch features and class logits of pixels.
    """
    features, right = [], 0.0
    for part, target in zip(pixels.split(batch), labels.split(batch), strict=True):
        found, logits = call(part)
        features.append(found)
        for index, group in enumerate(split_logits(logits).values()):
            right += (group.argmax(1) == target[:, index]).float().sum().item()
    return torch.cat(features), right / labels.numel()


def closeness(features: Tensor, plain: Tensor) -> float:
    """The mean cosine similarity of each patch's features to those without merging."""
    return F.cosine_similarity(features, plain, dim=-1).mean().item()


def angles_by_r(
    model: RotaryClassifier, values: list[int], pixels: Tensor, labels: Tensor, batch: int
) -> list[dict[str, Any]]:
    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.eva.forward_features(x)
        return tokens[:, 1:], model.eva.forward_head(tokens)

    plain, right = compared(call, pixels, labels, batch)
    rows: list[dict[str, Any]] = [{"angle": "", "r": 0, "right": right, "closeness": 1.0}]
    for r in values:
        for name, angles in ANGLES.items():
            with rotated_by(model.eva, angles, r):
                features, right = compared(call, pixels, labels, batch)
            rows.append(
                {"angle": name, "r": r, "right": right, "closeness": closeness(features, plain)}
            )
    return rows


def ways_by_speedup(
    model: Any, values: list[float], pixels: Tensor, labels: Tensor, batch: int
) -> list[dict[str, Any]]:
    """Merging for good and within blocks, at equal savings of multiply-adds."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.vit(x).last_hidden_state
        return tokens[:, 1:], model.classifier(tokens[:, 0])

    plain, right = compared(call, pixels, labels, batch)
    rows: list[dict[str, Any]] = [{"way": "", "speedup": 1, "right": right, "closeness": 1.0}]
    for speedup in values:
        for way, within in (("for good", False), ("within blocks", True)):
            with tomesd.patched(model, speedup=speedup, within_blocks=within):
                features, right = compared(call, pixels, labels, batch)
            rows.append(
                {
                    "way": way,
                    "speedup": speedup,
                    "right": right,
                    "closeness": closeness(features, plain),
                }
            )
    return rows
