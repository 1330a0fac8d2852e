"""The angles that scripts/dense.py compares with the library's."""

import math

import pytest
import torch

from benchmarks.dense.measurements import ANGLES, MeanAngle, MeanDirection, closeness, rotated_by
from tests.support.tiny_vits import build
from tomesd.core.token_map import TokenMap

PAIR = TokenMap.from_groups([[0, 1, 1, 2]])  # A class token leads.


def table(*angles: float) -> torch.Tensor:
    """Sines and cosines of one angle for each patch, [1, 1, patches, 2]."""
    return torch.tensor([[[[math.sin(a), math.cos(a)] for a in angles]]])


def test_the_mean_angle_of_two_is_half_way_between_them():
    (got,) = MeanDirection("rope").pick(table(0.2, 0.6, 1.0), PAIR, 1)
    torch.testing.assert_close(got, table(0.4, 1.0)[0])


def test_the_mean_of_rotations_is_shorter_than_one():
    got = MeanAngle("rope").pick(table(0.0, math.pi / 2, 1.0), PAIR, 1)
    assert got[0, 0, 0].norm() == pytest.approx(math.sqrt(0.5))


@torch.no_grad()
def test_a_model_merges_with_each_of_the_angles_and_is_restored():
    vit = build("timm EVA-02")
    plain = vit.output()
    found = []
    for angles in ANGLES.values():
        with rotated_by(vit.model, angles, r=9):
            found.append(vit.output())
    assert not torch.equal(found[0], found[1])
    assert torch.equal(vit.output(), plain)
    assert closeness(plain, plain) == pytest.approx(1)
