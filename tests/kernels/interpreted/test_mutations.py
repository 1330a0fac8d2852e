"""A deliberate error in any kernel is found."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.kernels.interpreted import test_matching, test_merging
from tests.kernels.interpreted.support import with_kernels
from tests.support.slow import slow
from tomesd.core import partition
from tomesd.core.matching import bipartite_soft_matching
from tomesd.kernels import matching, merging

pytestmark = slow


def match() -> None:
    sides = partition.windowed(7, 9, window=4)
    for seed in range(2):
        test_matching.check(test_matching.noise(seed, 2, 63, 40), sides, 25)
    test_matching.test_of_equal_tokens_the_first_sources_merge_into_the_first_destination_of_their_window()
    test_matching.test_of_equal_destinations_in_several_tiles_the_first_wins()
    test_matching.test_a_destination_with_nan_is_none()
    test_matching.test_zero_tokens_and_nan_give_a_map_and_read_nothing_outside_of_it()


def several_tiles() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        test_matching.test_tokens_and_sources_of_several_tiles_give_the_map_of_pytorch(monkeypatch)
        sides = partition.strided(12, 13, 3, 3)  # The last source that merges is in a later tile.
        with with_kernels():
            token_map = bipartite_soft_matching(torch.ones(1, 156, 4), sides, 90)
        assert token_map.moved.sort().values.tolist() == [sorted(sides.src.tolist()[:90])]


def merge() -> None:
    for how in test_merging.HOWS:
        for maps in (test_merging.made, test_merging.one_large_group):
            test_merging.test_merging_gives_what_pytorch_gives(maps, how)


def backward() -> None:
    for how in test_merging.HOWS:
        test_merging.test_gradients_of_merging_are_those_of_pytorch(test_merging.made, how)
    test_merging.test_gradients_of_merging_tiny_tokens_in_one_direction_are_those_of_pytorch()
    test_merging.test_gradients_of_merging_in_one_direction_stay_finite_for_zero_tokens()


def unmerge() -> None:
    test_merging.test_unmerging_gives_the_bits_that_pytorch_gives(test_merging.made)
    test_merging.test_the_residual_has_the_bits_that_pytorch_gives_in_float32(test_merging.made)
    test_merging.test_dropped_tokens_are_zeros()


# Kernel, what is written, what is written instead, and who notices.
ERRORS = [
    ("match_kernel", "tl.where(top > best, found", "tl.where(top >= best, found", match),
    ("match_kernel", "(dst >= 0)[None, :] & (scores == scores)", "(scores == scores)", match),
    ("match_kernel", "dots = tl.dot(a, tl.trans(b), dots", "dots = tl.dot(a, tl.trans(b)", match),
    ("match_kernel", "dst_squares += tl.sum(wide_b", "dst_squares = tl.sum(wide_b", match),
    ("cut_kernel", "(above >= wanted)", "(above >= wanted - 1)", match),
    ("cut_kernel", "(rank == wanted)", "(rank == 1)", match),
    ("cut_kernel", "    wanted -= tl.sum(equal)", "    wanted -= 0", several_tiles),
    ("link_kernel", "(there <= last)", "(there < last)", match),
    ("link_kernel", "other[None, :] < at[:, None]", "other[None, :] <= at[:, None]", match),
    ("number_kernel", "joined + tl.cumsum(merged) - merged", "joined + tl.cumsum(merged)", match),
    ("number_kernel", "heads += tl.sum", "heads = tl.sum", several_tiles),
    ("join_kernel", "mask=moves, other=0) + tl.load(place", "mask=moves, other=0) + 0 * tl.load(place", match),
    ("merge_kernel", "total / divisor[:, None]", "total", merge),
    ("_members", "mask=group + 1 < groups, other=moved", "mask=group + 1 < groups, other=0", merge),
    ("_lengths", "head_squares += tl.sum(own * own, 1)", "head_squares += 1", merge),
    ("_lengths", "    squares += tl.sum(total * total, 1)", "    squares += 1", merge),
    ("_lengths", "product += tl.sum(total *", "product += tl.sum(own *", backward),
    ("_total", "there = index < count", "there = index <= count", merge),
    ("_divisor", "divisor += tl.load(weight", "divisor = tl.load(weight", merge),
    ("merge_backward_kernel", "g -= total * along[:, None]", "g -= 0", backward),
    ("merge_backward_kernel", "own * of_length[:, None]", "0", backward),
    ("merge_backward_kernel", "own_g = g * _weights(weight, row, joins)", "own_g = g", backward),
    ("merge_backward_kernel", "tl.where(norm > 1e-6, product", "tl.where(norm > 1e-60, product", backward),
    ("unmerge_kernel", "mask = (group >= 0)", "mask = (group >= -1)", unmerge),
    ("unmerge_kernel", "value.to(tl.float32) - tl.load(merged", "value.to(tl.float32) + tl.load(merged", unmerge),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "right", "wrong", "notices"), ERRORS)
def test_a_deliberate_error_is_noticed(kernel, right, wrong, notices, tmp_path, monkeypatch):
    module = matching if hasattr(matching, kernel) else merging
    source = Path(module.__file__).read_text(encoding="utf-8")
    start = source.index(f"def {kernel}(")
    end = source.find("\n@triton.jit", start)
    body = source[start:end] if end > 0 else source[start:]
    assert right in body, "the kernel has changed: change this error with it"
    changed = source.replace(body, body.replace(right, wrong))
    file = tmp_path / f"{kernel}_with_an_error.py"
    file.write_text(changed, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    test_merging.made()  # Before, with the right kernels.
    for name in dir(module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, getattr(broken, name))
    assert fails(notices)


def test_every_kernel_has_a_deliberate_error():
    kernels = {
        name for each in (matching, merging) for name in dir(each) if name.endswith("_kernel")
    }
    assert kernels <= {kernel for kernel, *_ in ERRORS}


def fails(notices: Callable[[], None]) -> bool:
    """In a process of its own: a kernel with an error may write where it must not."""
    child = os.fork()
    if child == 0:
        try:
            notices()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_without_an_error_nothing_is_noticed():
    for notices in (match, several_tiles, merge, backward, unmerge):
        assert not fails(notices)
