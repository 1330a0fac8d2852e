"""Merging and unmerging by kernels give what PyTorch gives, gradients too."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted.support import both, with_kernels
from tests.kernels.interpreted.test_matching import noise
from tests.support.slow import slow_but
from tomesd import TokenMap
from tomesd.core import partition
from tomesd.core.frames import concatenate, in_frames
from tomesd.core.matching import bipartite_soft_matching, random_pruning
from tomesd.core.order import renumbered
from tomesd.diffusion.block import add_residual
from tomesd.diffusion.dit.heads import first_samples

BATCH, N, M = 2, 60, 30
HOWS = ["mean", "sum", "direction", "weighted"]


@cache
def made(channels: int = 8) -> TokenMap:
    """A map made by kernels."""
    with with_kernels():
        return bipartite_soft_matching(
            noise(3, BATCH, N, channels), partition.windowed(6, 10, window=4), N - M
        )


@cache
def one_large_group() -> TokenMap:
    return TokenMap.from_groups(torch.arange(M).repeat(BATCH, 2).clamp(max=20))


@cache
def composed() -> TokenMap:
    """A map that kernels did not make."""
    first = TokenMap.from_groups(torch.arange(40).repeat(BATCH, 2)[:, :N])
    return first.then(TokenMap.from_groups((torch.arange(40) * 3 // 4).expand(BATCH, -1)))


@cache
def reordered() -> TokenMap:
    """A map that kernels made, with other numbers for its groups: as `destinations_last` has it."""
    number = [noise(20 + each, M).argsort() for each in range(BATCH)]
    return renumbered(made(), torch.stack(number))


def merge(token_map: TokenMap, x: Tensor, how: str) -> Tensor:
    if how != "weighted":
        return token_map.merge(x, how=how)
    return token_map.merge(x, weight=1 + noise(4, len(x), x.shape[1], 1).abs())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("maps", [made, one_large_group, composed])
def test_merging_gives_what_pytorch_gives(maps, how):
    x = noise(5, BATCH, N, 20)
    torch.testing.assert_close(*both(lambda: merge(maps(), x, how)))


@pytest.mark.parametrize("channels", slow_but([300], [1, 17, 300, 640]))
@pytest.mark.parametrize("how", HOWS)
def test_channels_of_several_tiles_merge_alike(how, channels):
    x = noise(5, BATCH, N, channels)
    torch.testing.assert_close(*both(lambda: merge(made(), x, how)))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_in_half_precision_are_those_of_float32_rounded_once(dtype, how):
    x = noise(6, BATCH, N, 20).to(dtype)
    with with_kernels():
        got = merge(one_large_group(), x, how)
    assert got.dtype == dtype
    expected = merge(one_large_group(), x.float(), how)
    torch.testing.assert_close(got.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("maps", [made, composed])
def test_unmerging_gives_the_bits_that_pytorch_gives(maps):
    y = noise(7, BATCH, M, 300).half()
    expected, got = both(lambda: maps().unmerge(y))
    assert torch.equal(expected, got)


def test_dropped_tokens_are_zeros():
    dropped = random_pruning(BATCH, N, partition.random(N, n_src=20))
    y = noise(8, BATCH, 40, 12)
    expected, got = both(lambda: dropped.unmerge(y))
    assert torch.equal(expected, got)
    assert (got == 0).all(-1).sum() == BATCH * 20


@pytest.mark.parametrize("maps", [made, composed])
def test_the_residual_has_the_bits_that_pytorch_gives_in_float32(maps):
    x, merged, y = noise(9, BATCH, N, 40), noise(10, BATCH, M, 40), noise(11, BATCH, M, 40)
    expected, got = both(lambda: add_residual(maps(), x, merged, y))
    assert torch.equal(expected, got)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("maps", [made, composed, reordered])
def test_gradients_of_merging_are_those_of_pytorch(maps, how):
    direction = noise(12, BATCH, M, 20)

    def gradient() -> Tensor:
        x = noise(13, BATCH, N, 20).requires_grad_()
        (merge(maps(), x, how) * direction).sum().backward()
        return x.grad

    torch.testing.assert_close(*both(gradient))


def test_gradients_of_merging_tiny_tokens_in_one_direction_are_those_of_pytorch():
    def gradient() -> Tensor:
        x = (1e-7 * noise(13, BATCH, N, 20)).requires_grad_()
        (made().merge(x, how="direction") * noise(12, BATCH, M, 20)).sum().backward()
        return x.grad

    torch.testing.assert_close(*both(gradient))


def test_gradients_of_merging_in_one_direction_stay_finite_for_zero_tokens():
    def gradient() -> Tensor:
        x = torch.zeros(BATCH, N, 20, requires_grad=True)
        made().merge(x, how="direction").sum().backward()
        return x.grad

    assert gradient().isfinite().all()
    with with_kernels():
        assert gradient().isfinite().all()


@pytest.mark.parametrize("maps", [made, composed, reordered])
def test_gradients_of_unmerging_and_of_the_residual_are_those_of_pytorch(maps):
    direction = noise(14, BATCH, N, 20)

    def gradients() -> list[Tensor]:
        shapes = [(BATCH, N, 20), (BATCH, M, 20), (BATCH, M, 20), (BATCH, M, 20)]
        x, merged, y, z = (noise(i, *shape).requires_grad_() for i, shape in enumerate(shapes))
        added = add_residual(maps(), x, merged, y) + maps().unmerge(z)
        (added * direction).sum().backward()
        return [each.grad for each in (x, merged, y, z)]

    for expected, got in zip(*both(gradients), strict=True):
        torch.testing.assert_close(expected, got)


def test_gradients_of_unmerging_after_pruning_are_those_of_pytorch():
    dropped = random_pruning(BATCH, N, partition.random(N, n_src=20))

    def gradient() -> Tensor:
        y = noise(15, BATCH, 40, 12).requires_grad_()
        (dropped.unmerge(y) * noise(16, BATCH, N, 12)).sum().backward()
        return y.grad

    torch.testing.assert_close(*both(gradient))


def test_the_laws_of_token_maps_hold():
    y, x = noise(17, BATCH, M, 20), noise(18, BATCH, N, 20)
    with with_kernels():
        torch.testing.assert_close(made().merge(made().unmerge(y)), y)
        once = made().unmerge(made().merge(x))
        torch.testing.assert_close(made().unmerge(made().merge(once)), once)
        merged = made().merge(x)
        for f in (torch.tanh, torch.square):
            law = made().merge(x + made().unmerge(f(merged)))
            torch.testing.assert_close(law, merged + f(merged))


def test_maps_of_parts_of_a_batch_and_of_videos_merge_alike():
    x = noise(19, BATCH, N, 12)
    for token_map, tokens in (
        (first_samples(made(), 1), x[:1]),
        (made().repeat(2), x.repeat(2, 1, 1)),
        (reordered(), x),
        (in_frames(made(), BATCH), x.flatten(0, 1)[None]),
        (concatenate([made(), composed()]), x.repeat(1, 2, 1)),
    ):
        torch.testing.assert_close(*both(lambda t=token_map, x=tokens: t.merge(x)))
        merged = token_map.merge(tokens)
        expected, got = both(lambda t=token_map, y=merged: t.unmerge(y))
        assert torch.equal(expected, got)
