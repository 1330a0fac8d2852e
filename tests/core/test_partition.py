"""Partitions: what may merge into what, for grids of any size, and randomness without a state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tomesd.core import partition
from tomesd.core.partition import Partition, make_key

sides = st.integers(1, 20)
strides = st.integers(1, 6)
# None: the top left place of each cell.
keys = st.none() | st.integers(0, 2**32).map(make_key)


def assert_covers(got: Partition, tokens: range) -> None:
    """Every token is a source or a destination, once; nothing else is either."""
    assert sorted(torch.cat(got).tolist()) == list(tokens)
    assert got.src.dtype == got.dst.dtype == torch.int64


def cell_of(token: int, w: int, sy: int, sx: int) -> tuple[int, int]:
    return token // w // sy, token % w // sx


# Cells.


@given(sides, sides, strides, strides, keys)
def test_every_token_of_any_grid_is_a_source_or_a_destination_and_none_is_lost(h, w, sy, sx, key):
    assert_covers(partition.strided(h, w, sy, sx, key=key), range(h * w))


@given(sides, sides, strides, strides, keys)
def test_every_cell_of_any_grid_has_exactly_one_destination_inside_it(h, w, sy, sx, key):
    dst = partition.strided(h, w, sy, sx, key=key).dst.tolist()
    cells = {(y // sy, x // sx) for y in range(h) for x in range(w)}
    assert sorted(cell_of(token, w, sy, sx) for token in dst) == sorted(cells)


@given(sides, sides, strides, strides)
def test_without_a_key_the_destination_is_the_top_left_token_of_its_cell(h, w, sy, sx):
    expected = [y * w + x for y in range(0, h, sy) for x in range(0, w, sx)]
    assert partition.strided(h, w, sy, sx).dst.tolist() == expected


@given(sides, sides, strides, strides, keys)
def test_sources_keep_the_order_of_the_tokens(h, w, sy, sx, key):
    src = partition.strided(h, w, sy, sx, key=key).src
    assert (src.diff() > 0).all()


# Randomness.


def assert_even(counts: torch.Tensor) -> None:
    """All within 5 standard deviations of the mean: less than one in a million goes beyond."""
    mean = counts.double().mean()
    assert ((counts - mean).abs() < 5 * mean.sqrt()).all(), counts.tolist()


@pytest.mark.parametrize(
    "keys",
    [
        [make_key(seed) for seed in range(1000)],
        [make_key(0, step=step) for step in range(1000)],
        [make_key(0, step=step / 1000) for step in range(1000)],
        [make_key(0, step=981, block=block) for block in range(1000)],
    ],
    ids=["seeds", "timesteps", "noise levels", "blocks"],
)
def test_over_keys_destinations_are_uniform_in_a_cell_and_independent_between_cells(keys):
    # 5×8 tokens in cells of 2×3: the last row and the last column of cells are smaller.
    dst = torch.stack([partition.strided(5, 8, 2, 3, key=key).dst for key in keys])
    for cell in dst.T:
        assert_even(cell.unique(return_counts=True)[1])
    assert [len(cell.unique()) for cell in dst.T] == [6, 6, 4, 6, 6, 4, 3, 3, 2]
    # Places in the first cell, against those in its neighbour and those at the next key.
    place = dst[:, 0] % 8 + 3 * (dst[:, 0] // 8)
    neighbour = dst[:, 1] % 8 - 3 + 3 * (dst[:, 1] // 8)
    assert_even((place * 6 + neighbour).bincount(minlength=36))
    assert_even((place[1:] * 6 + place[:-1]).bincount(minlength=36))


def test_over_keys_every_token_is_a_source_of_a_random_partition_equally_often():
    src = torch.cat([partition.random(12, n_src=5, key=make_key(seed)).src for seed in range(1000)])
    assert_even(src.bincount(minlength=12))


@given(st.integers(0, 2**32), st.floats(0, 1000, width=32), st.integers(0, 100))
def test_the_same_key_gives_the_same_partition_whatever_the_global_random_state(seed, step, block):
    def both() -> list[torch.Tensor]:
        key = make_key(seed, step, block)
        return [*partition.strided(9, 7, key=key), *partition.random(30, key=key)]

    state = torch.get_rng_state()
    first = both()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        again = both()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_another_seed_step_or_block_is_another_key():
    settings = [(s, t, b) for s in range(10) for t in (0, 1, 2, 0.5, 980, 981) for b in range(10)]
    assert len({int(make_key(*each)) for each in settings}) == len(settings)
    # Nor do they stand in for one another.
    assert len({int(make_key(1)), int(make_key(0, 1)), int(make_key(0, 0, 1))}) == 3


@pytest.mark.parametrize("step", [981, 0.5])
def test_the_key_is_the_same_for_a_number_a_tensor_and_a_batch_of_timesteps(step):
    expected = make_key(3, step, block=2)
    assert expected.shape == ()
    assert expected.dtype == torch.int64
    for form in (torch.tensor(step), torch.tensor([step]), torch.tensor([step] * 4)):
        for dtype in (form.dtype, torch.float64, torch.float16):
            assert make_key(3, form.to(dtype), block=2) == expected


def test_a_random_partition_has_a_default_that_is_random_too():
    tokens = list(range(100))
    default = partition.random(100)
    assert default.src.tolist() == partition.random(100, key=make_key(0)).src.tolist()
    assert torch.cat(default).tolist() != tokens


# Flattened tokens.

prefixed = st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(prefixed)
def test_alternating_is_every_other_token_and_protects_the_prefix(case):
    n, prefix = case
    got = partition.alternating(n, prefix=prefix)
    assert got.src.tolist() == [token for token in range(prefix, n) if token % 2 == 0]
    assert got.dst.tolist() == [token for token in range(prefix, n) if token % 2 == 1]


@given(prefixed, keys, st.data())
def test_random_covers_all_but_the_protected_prefix_with_the_sources_asked_for(case, key, data):
    n, prefix = case
    half = partition.random(n, key=key, prefix=prefix)
    assert_covers(half, range(prefix, n))
    assert 0 <= len(half.src) - len(half.dst) <= 1
    n_src = data.draw(st.integers(0, n - prefix))
    got = partition.random(n, n_src=n_src, key=key, prefix=prefix)
    assert_covers(got, range(prefix, n))
    assert len(got.src) == n_src


# Bad input.


@pytest.mark.parametrize("name", ["h", "w", "sy", "sx"])
@pytest.mark.parametrize("value", [0, -3])
def test_sides_and_strides_below_one_are_refused_by_name(name, value):
    arguments = {"h": 4, "w": 4, "sy": 2, "sx": 2} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} must be 1 or more, got {value}$"):
        partition.strided(**arguments)


@pytest.mark.parametrize("kind", [partition.alternating, partition.random])
def test_a_number_of_tokens_or_a_prefix_that_cannot_be_is_refused(kind):
    with pytest.raises(ValueError, match=r"^n must be 0 or more, got -1$"):
        kind(-1)
    for prefix in (-1, 6):
        with pytest.raises(ValueError, match=f"^prefix must be from 0 to n=5, got {prefix}$"):
            kind(5, prefix=prefix)


@pytest.mark.parametrize("n_src", [-1, 5])
def test_more_random_sources_than_tokens_are_refused(n_src):
    with pytest.raises(ValueError, match=f"^n_src must be from 0 to 4, got {n_src}$"):
        partition.random(5, n_src=n_src, prefix=1)


# Windows.

windows = st.integers(1, 24)


@given(sides, sides, strides, strides, windows, keys)
def test_in_windows_too_every_token_is_a_source_or_a_destination_once(h, w, sy, sx, window, key):
    got = partition.windowed(h, w, sy, sx, window=window, key=key)
    every = torch.cat([got.src.flatten(), got.dst.flatten()])
    assert sorted(every[every >= 0].tolist()) == list(range(h * w))
    assert (got.src < 0).sum() == got.padding


@given(sides, sides, strides, strides, windows, keys)
def test_windows_have_the_destinations_of_the_whole_grid(h, w, sy, sx, window, key):
    dst = partition.windowed(h, w, sy, sx, window=window, key=key).dst
    whole = partition.strided(h, w, sy, sx, key=key).dst
    assert sorted(dst[dst >= 0].tolist()) == sorted(whole.tolist())


@given(sides, sides, strides, strides, windows, keys)
def test_a_window_is_a_rectangle_of_whole_cells_no_larger_than_asked_for(h, w, sy, sx, window, key):
    got = partition.windowed(h, w, sy, sx, window=window, key=key)
    for src, dst in zip(got.src, got.dst, strict=True):
        tokens = [token for token in torch.cat([src, dst]).tolist() if token >= 0]
        if not tokens:
            continue
        rows, columns = {t // w for t in tokens}, {t % w for t in tokens}
        assert len(tokens) == len(rows) * len(columns)
        for places, stride, end in ((rows, sy, h), (columns, sx, w)):
            assert max(places) - min(places) + 1 == len(places) <= max(window, stride)
            assert min(places) % stride == 0
            assert (max(places) + 1) % stride == 0 or max(places) + 1 == end


@given(sides, sides, strides, strides, keys)
def test_a_window_larger_than_the_grid_is_all_of_it(h, w, sy, sx, key):
    got = partition.windowed(h, w, sy, sx, window=max(h, w) + max(sy, sx), key=key)
    assert got.dst.shape[0] == 1


@pytest.mark.parametrize(("side", "shape"), [(64, (4, 768)), (96, (9, 768)), (128, (16, 768))])
def test_windows_that_divide_the_grid_are_not_padded(side, shape):
    got = partition.windowed(side, side, window=32)
    assert got.src.shape == shape
    assert got.padding == 0


def test_a_window_below_one_token_is_refused():
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        partition.windowed(4, 4, window=0)
