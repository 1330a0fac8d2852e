"""Matching by kernels gives the maps that PyTorch gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.interpreted.support import assert_a_map, assert_same_map, both, with_kernels
from tests.support.slow import slow
from tomesd.core import partition
from tomesd.core.matching import bipartite_soft_matching
from tomesd.core.partition import Partition, make_key
from tomesd.kernels import launches


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw):
    """Tokens, a partition of them with windows or without, and r."""
    seed, batch = draw(st.integers(0, 2**31)), draw(st.integers(1, 3))
    h, w, channels = draw(st.integers(2, 11)), draw(st.integers(2, 11)), draw(st.integers(3, 70))
    key = draw(st.none() | st.just(make_key(seed)))
    kind = draw(st.sampled_from(["windowed", "windowed", "strided", "alternating", "random"]))
    if kind in ("windowed", "strided"):
        cells = h, w, draw(st.integers(1, 3)), draw(st.integers(2, 3))
        window = [draw(st.integers(2, 9))] if kind == "windowed" else []
        sides = getattr(partition, kind)(*cells, *window, key=key)
    elif kind == "alternating":
        sides = partition.alternating(h * w, prefix=draw(st.integers(0, 2)))
    else:  # Tokens on neither side, and sources out of order.
        sides = partition.random(h * w, key=key, prefix=draw(st.integers(0, h * w - 2)), n_src=1)
    padding = 0 if isinstance(sides, Partition) else sides.padding
    sources = sides.src.numel() - padding
    r = draw(st.integers(1, sources))
    return noise(seed, batch, h * w, channels), sides, r


def check(metric: torch.Tensor, sides, r: int) -> None:
    expected, got = both(lambda: bipartite_soft_matching(metric, sides, r))
    assert_same_map(expected, got)
    assert_a_map(got, metric.shape[1])


@given(cases())
@settings(max_examples=8)
def test_in_float32_the_maps_are_those_of_pytorch(case):
    check(*case)


@slow
@given(cases())
@settings(max_examples=100)
def test_in_float32_many_more_maps_are_those_of_pytorch(case):
    check(*case)


def test_tokens_and_sources_of_several_tiles_give_the_map_of_pytorch(monkeypatch):
    for name in ("BLOCK", "LINK_TILE", "LINK_BLOCK"):
        monkeypatch.setattr(launches, name, 32)
    check(noise(0, 2, 12 * 13, 8), partition.strided(12, 13, 3, 3), 90)


@slow
def test_tokens_and_sources_of_several_whole_tiles_give_the_map_of_pytorch():
    check(noise(0, 1, 30 * 41, 8), partition.strided(30, 41, 4, 4), 700)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_maps_are_those_of_float32(dtype):
    # PyTorch rounds normalized tokens and similarities; the kernel rounds neither.
    metric, sides = noise(1, 2, 8 * 12, 40).to(dtype), partition.windowed(8, 12, window=4)
    expected = bipartite_soft_matching(metric.float(), sides, 40)
    with with_kernels():
        assert_same_map(expected, bipartite_soft_matching(metric, sides, 40))


def test_of_equal_tokens_the_first_sources_merge_into_the_first_destination_of_their_window():
    sides = partition.windowed(4, 8, window=4)
    with with_kernels():
        token_map = bipartite_soft_matching(torch.ones(2, 32, 8), sides, 15)
    assert_a_map(token_map, 32)
    first, second = sides.src.tolist()
    for moved, group, head in zip(token_map.moved, token_map.group, token_map.head, strict=True):
        assert sorted(moved.tolist()) == sorted(first + second[:3])
        into = head[group[moved]].tolist()
        assert into == [0] * 12 + [4] * 3


def test_of_equal_destinations_in_several_tiles_the_first_wins():
    with with_kernels():
        token_map = bipartite_soft_matching(
            torch.ones(1, 96, 4), partition.strided(8, 12, 1, 2), 48
        )
    assert token_map.size[0, 0] == 49


def test_a_destination_with_nan_is_none():
    metric, sides = noise(4, 1, 24, 8).abs(), partition.strided(4, 6)
    metric[0, sides.dst[2]] = 0  # All other similarities are above 0.
    expected = bipartite_soft_matching(metric, sides, len(sides.src))
    metric[0, sides.dst[2]] = float("nan")
    with with_kernels():
        assert_same_map(expected, bipartite_soft_matching(metric, sides, len(sides.src)))


def test_zero_tokens_and_nan_give_a_map_and_read_nothing_outside_of_it():
    metric = noise(2, 2, 7 * 9, 12)
    metric[0, :20] = 0
    metric[1, 10:30] = float("nan")
    metric[1, 3] = float("inf")
    sides = partition.windowed(7, 9, 2, 2, window=4)
    for r in (1, 20, sides.src.numel() - sides.padding):
        with with_kernels():
            assert_a_map(bipartite_soft_matching(metric, sides, r), 63)
