"""Matching: the right tokens merge, exactly r of them, in bounded memory and without looking."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import slow_reference
from tomesd import TokenMap
from tomesd.core import matching, partition
from tomesd.core.matching import bipartite_soft_matching, random_pruning
from tomesd.core.partition import Partition, make_key

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_metric(seed: int, batch: int, n: int, channels: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, channels, generator=generator, dtype=torch.float64).to(dtype)


def some_partition(seed: int, n: int) -> Partition:
    """Also unbalanced ones, with sources out of order and tokens on neither side."""
    prefix = seed % 3
    n_src = (n - prefix - 1) * (seed % 5) // 4
    return partition.random(n, key=make_key(seed), prefix=prefix, n_src=n_src)


@st.composite
def cases(draw):
    """A metric, a partition and r."""
    seed, batch, n = draw(st.integers(0, 2**31)), draw(st.integers(1, 3)), draw(st.integers(3, 40))
    sides = some_partition(seed, n)
    # Two channels or more: with one, all cosines are 1 or −1 and which of them merge is open.
    metric = random_metric(seed, batch, n, draw(st.integers(2, 16)))
    return metric, sides, draw(st.integers(0, len(sides.src)))


def groups_of(token_map: TokenMap) -> list[list[list[int]]]:
    """For each sample, for each head in order, the head and then the others."""
    return [
        [[h] + [t for t, g in enumerate(group) if g == i and t != h] for i, h in enumerate(head)]
        for group, head in zip(token_map.group.tolist(), token_map.head.tolist(), strict=True)
    ]


def assert_same(a: TokenMap, b: TokenMap) -> None:
    for name in ("group", "head", "size"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# Which tokens merge.


def assert_as_the_slow_reference(metric: torch.Tensor, sides: Partition, r: int) -> None:
    src, dst = sides.src.tolist(), sides.dst.tolist()
    expected = [slow_reference.bipartite_soft_matching(m, src, dst, r) for m in metric.tolist()]
    assert groups_of(bipartite_soft_matching(metric, sides, r)) == expected


@given(cases())
def test_the_same_tokens_merge_as_by_plain_loops(case):
    assert_as_the_slow_reference(*case)


@st.composite
def windowed_cases(draw):
    """Grids that windows and cells need not divide, a metric on them, and r."""
    h, w, window = (draw(st.integers(1, 9)) for _ in range(3))
    sy, sx = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    key = draw(st.none() | st.just(make_key(seed)))
    sides = partition.windowed(h, w, sy, sx, window=window, key=key)
    metric = random_metric(seed, draw(st.integers(1, 3)), h * w, draw(st.integers(2, 8)))
    return metric, sides, draw(st.integers(0, sides.src.numel() - sides.padding))


@given(windowed_cases())
def test_in_windows_each_source_finds_its_own_and_the_best_of_all_windows_merge(case):
    metric, sides, r = case
    found = bipartite_soft_matching(metric, sides, r)
    assert found.m == metric.shape[1] - r
    for sample, groups in zip(metric.tolist(), groups_of(found), strict=True):
        edges = []
        for src, dst in zip(sides.src.tolist(), sides.dst.tolist(), strict=True):
            src, dst = [t for t in src if t >= 0], [t for t in dst if t >= 0]
            alone = slow_reference.bipartite_soft_matching(sample, src, dst, len(src))
            edges += [
                (slow_reference.cosine(sample[s], sample[head]), s, head)
                for head, *others in alone
                for s in others
            ]
        best = sorted(edges, reverse=True)[:r]
        assert {(s, head) for _, s, head in best} == {
            (s, head) for head, *others in groups for s in others
        }


@given(windowed_cases())
def test_refinement_moves_each_source_to_the_most_similar_group(case):
    metric, sides, _ = case
    found = bipartite_soft_matching(metric, sides, r=sides.src.numel() - sides.padding, refine=1)
    for sample, groups in zip(metric.tolist(), groups_of(found), strict=True):
        expected = []
        for src, dst in zip(sides.src.tolist(), sides.dst.tolist(), strict=True):
            src, dst = [t for t in src if t >= 0], [t for t in dst if t >= 0]
            first = slow_reference.bipartite_soft_matching(sample, src, dst, len(src))
            first = [group for group in first if group[0] in dst]
            expected += slow_reference.refined(sample, first, src, dst)
        assert {frozenset(group) for group in groups} == {frozenset(group) for group in expected}


@given(windowed_cases())
def test_more_refinement_rounds_make_groups_more_similar(case):
    metric, sides, _ = case
    direction = metric / metric.norm(dim=-1, keepdim=True)
    alike = []
    for refine in (0, 1, 3):
        r = sides.src.numel() - sides.padding
        token_map = bipartite_soft_matching(metric, sides, r=r, refine=refine)
        alike.append(token_map.merge(direction, how="sum").norm(dim=-1).sum().item())
    assert alike[0] <= alike[1] + 1e-9
    assert alike[1] <= alike[2] + 1e-9


# Not of random seeds: in float32 two random cosines are now and then equal.
@pytest.mark.parametrize("seed", range(4))
def test_the_same_tokens_merge_as_by_plain_loops_in_float32_on_a_grid(seed):
    metric = random_metric(seed, 2, 7 * 6, 8, torch.float32)
    for sides in (partition.strided(7, 6, key=make_key(seed)), partition.alternating(42, prefix=1)):
        assert_as_the_slow_reference(metric, sides, r=len(sides.src) // 2)


@given(cases())
def test_a_map_has_r_groups_fewer_than_tokens(case):
    metric, sides, r = case
    token_map = bipartite_soft_matching(metric, sides, r)
    assert token_map.m == metric.shape[1] - r
    assert token_map.moved.shape == (metric.shape[0], r)
    assert token_map.n == metric.shape[1]
    assert (token_map.size.sum(1) == token_map.n).all()


@given(cases())
def test_destinations_and_protected_tokens_never_merge_away(case):
    metric, sides, _ = case
    token_map = bipartite_soft_matching(metric, sides, r=len(sides.src))
    stay = sorted(set(range(metric.shape[1])) - set(sides.src.tolist()))
    assert token_map.head.tolist() == [stay] * metric.shape[0]
    protected = torch.tensor(sorted(set(stay) - set(sides.dst.tolist())), dtype=torch.int64)
    alone = token_map.group[:, protected]
    assert (token_map.size[..., 0].gather(1, alone) == 1).all()


@given(cases())
def test_with_r_zero_nothing_merges(case):
    metric, sides, _ = case
    token_map = bipartite_soft_matching(metric, sides, r=0)
    assert torch.equal(token_map.merge(metric), metric)
    assert torch.equal(token_map.unmerge(metric), metric)


@pytest.mark.parametrize(
    "sides", [partition.strided(6, 6), partition.windowed(6, 6, window=4)], ids=["all", "windows"]
)
@pytest.mark.parametrize("refine", [0, 1])
def test_an_empty_batch_gives_empty_tokens_of_the_right_shape(sides, refine):
    x = torch.empty(0, 36, 8)
    found = bipartite_soft_matching(x, sides, 12, refine=refine)
    merged = found.merge(x, how="direction")
    assert merged.shape == (0, 24, 8)
    assert found.unmerge(merged).shape == (0, 36, 8)
    assert found.then(bipartite_soft_matching(merged, partition.alternating(24), 6)).m == 18


def test_only_the_direction_of_a_token_counts_not_its_length():
    metric = random_metric(0, 2, 36, 8)
    sides = partition.strided(6, 6)
    length = 10.0 ** random_metric(1, 2, 36, 1)
    same = bipartite_soft_matching(metric * length, sides, r=15)
    assert_same(same, bipartite_soft_matching(metric, sides, r=15))


def test_each_sample_merges_by_its_own_features():
    metric = random_metric(0, 3, 36, 8)
    sides = partition.strided(6, 6)
    together = bipartite_soft_matching(metric, sides, r=15)
    for sample in range(3):
        alone = bipartite_soft_matching(metric[sample : sample + 1], sides, r=15)
        assert torch.equal(together.group[sample], alone.group[0])
    assert not torch.equal(together.group[0], together.group[1])


def test_of_equally_similar_destinations_the_first_is_taken():
    metric = torch.ones(1, 4, 3)
    sides = Partition(src=torch.tensor([0, 3]), dst=torch.tensor([1, 2]))
    assert bipartite_soft_matching(metric, sides, r=2).group.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matching_twice_gives_the_same_map_also_where_similarities_are_equal(dtype):
    sides = partition.strided(12, 12)
    for metric in (random_metric(0, 2, 144, 4, dtype), torch.ones(2, 144, 4, dtype=dtype)):
        first = bipartite_soft_matching(metric, sides, r=50)
        assert_same(first, bipartite_soft_matching(metric, sides, r=50))


# Numbers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -60000.0, 1e-7])
def test_zero_and_constant_tokens_match_without_nan(dtype, value):
    metric = torch.full((2, 36, 320), value, dtype=dtype)
    token_map = bipartite_soft_matching(metric, partition.strided(6, 6), r=20)
    assert token_map.m == 16
    assert (token_map.size.sum(1) == 36).all()
    torch.testing.assert_close(
        token_map.unmerge(token_map.merge(metric)), metric, atol=0, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_token_is_similar_to_nothing(dtype):
    metric = torch.zeros(1, 4, 2, dtype=dtype)
    metric[0, 1:] = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 0.0]], dtype=dtype)
    sides = Partition(src=torch.tensor([0, 2, 3]), dst=torch.tensor([1]))
    assert bipartite_soft_matching(metric, sides, r=1).group.tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_each_token_the_twin_it_has(dtype):
    # Norms go past float16's largest number, 65,504: squares, or the norm itself, would be inf.
    metric = random_metric(0, 2, 128, 64).to(dtype)
    metric[:, 64:] = metric[:, :64]
    metric = (metric * 12000).clamp(-60000, 60000)
    sides = Partition(src=torch.arange(64), dst=torch.arange(64, 128))
    token_map = bipartite_soft_matching(metric, sides, r=64)
    assert token_map.group.tolist() == [[*range(64), *range(64)]] * 2


# Memory.


@given(cases() | windowed_cases(), st.integers(1, 5000), st.integers(0, 2))
def test_matching_in_chunks_gives_the_same_map_as_all_at_once(case, chunk_bytes, refine):
    with patch.object(matching, "CPU_CHUNK_BYTES", 2**40):
        at_once = bipartite_soft_matching(*case, refine=refine)
    with patch.object(matching, "CPU_CHUNK_BYTES", chunk_bytes):
        assert_same(bipartite_soft_matching(*case, refine=refine), at_once)


# Gradients.


def test_gradients_flow_through_merging_and_not_through_the_matching():
    x = random_metric(0, 2, 36, 8).requires_grad_()
    token_map = bipartite_soft_matching(x, partition.strided(6, 6), r=18)
    for field in (token_map.group, token_map.head, token_map.moved, token_map.size):
        assert not field.requires_grad
    token_map.unmerge(token_map.merge(x)).square().sum().backward()
    # The mean of the group, as if the map had been given from outside.
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * token_map.unmerge(token_map.merge(x)).detach())


def test_the_matching_keeps_nothing_for_the_backward_pass():
    x = random_metric(0, 2, 36, 8).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        bipartite_soft_matching(x, partition.strided(6, 6), r=18)
    assert not kept


# Compilation.


def merge_half(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    key = make_key(0, step=timestep, block=1)
    # Windows of two sizes, so that some are padded.
    sides = partition.windowed(6, 7, window=4, key=key)
    token_map = bipartite_soft_matching(x, sides, r=21, refine=1)
    return x + token_map.unmerge(torch.tanh(token_map.merge(x, how="direction")))


def prune_half(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    sides = partition.random(42, n_src=21, key=make_key(0, step=timestep))
    token_map = random_pruning(x.shape[0], 42, sides)
    return x + token_map.unmerge(torch.tanh(token_map.merge(x)))


@pytest.mark.parametrize("function", [merge_half, prune_half])
def test_matching_merging_and_unmerging_compile_to_one_graph_for_all_timesteps(function):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    x = random_metric(0, 2, 42, 8, torch.float32)
    for timestep in (981.0, 961.0, 1.0):
        at = torch.tensor(timestep)
        torch.testing.assert_close(compiled(x, at), function(x, at), rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", [merge_half, prune_half])
def test_matching_never_syncs_with_the_device(function):
    # Tensors without values: whatever looked at one would raise.
    with FakeTensorMode():
        assert function(torch.randn(2, 42, 8), torch.tensor(981.0)).shape == (2, 42, 8)


# Pruning.


@given(st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**31), st.data())
def test_random_pruning_drops_the_sources_and_fills_them_with_zeros(batch, n, seed, data):
    r = data.draw(st.integers(0, n - 1))
    sides = partition.random(n, n_src=r, key=make_key(seed))
    token_map = random_pruning(batch, n, sides)
    assert (token_map.n, token_map.m) == (n, n - r)
    x = random_metric(seed, batch, n, 3)
    kept = sides.dst.sort().values
    assert torch.equal(token_map.merge(x), x[:, kept])
    spread = token_map.unmerge(token_map.merge(x))
    assert torch.equal(spread[:, kept], x[:, kept])
    assert (spread[:, sides.src] == 0).all()


# Bad input.


def test_dropping_all_tokens_is_refused():
    message = "^partition must have fewer sources than the 6 tokens, got 6$"
    with pytest.raises(ValueError, match=message):
        random_pruning(1, 6, partition.random(6, n_src=6))


@pytest.mark.parametrize("r", [-1, 28])
def test_r_below_zero_or_above_the_sources_is_refused(r):
    with pytest.raises(ValueError, match=f"^r must be from 0 to the 27 sources, got {r}$"):
        bipartite_soft_matching(torch.ones(1, 36, 2), partition.strided(6, 6), r)


def test_a_negative_number_of_rounds_is_refused():
    with pytest.raises(ValueError, match=r"^refine must be 0 or more, got -1$"):
        bipartite_soft_matching(torch.ones(1, 36, 2), partition.strided(6, 6), 1, refine=-1)


def test_merging_without_a_destination_is_refused():
    sides = partition.random(6, n_src=6)
    assert bipartite_soft_matching(torch.ones(1, 6, 2), sides, r=0).m == 6
    with pytest.raises(ValueError, match=r"^r must be 0 where there is no destination, got 1$"):
        bipartite_soft_matching(torch.ones(1, 6, 2), sides, r=1)
