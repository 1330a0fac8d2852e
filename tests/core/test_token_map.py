"""The laws of token maps, for random maps, shapes and dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import slow_reference
from tomesd import TokenMap

# Of the largest value involved. float32: sums of up to 300 values. The others: their own rounding,
# twice; sums are taken in float32 and add nothing.
TOLERANCE = {torch.float32: 300 * 2**-24, torch.bfloat16: 2**-7, torch.float16: 2**-10}

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(list(TOLERANCE))
merges, drops = st.just("merges"), st.just("drops")
fates = merges | drops


class Draw:
    """All that a property needs of the random, from one seed: cheap to make, easy to shrink."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def values(self, *shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def map(self, batch: int, n: int, m: int, fate: str = "merges") -> TokenMap:
        """Random heads, another choice in each sample; the others join a random one of them."""
        places = torch.rand(batch, n, generator=self.generator).argsort(1)
        heads, moved = places[:, :m], places[:, m:]
        if fate == "drops":
            return TokenMap.from_moves(n, moved, None)
        joined = torch.randint(m, moved.shape, generator=self.generator)
        return TokenMap.from_moves(n, moved, heads.gather(1, joined))


@st.composite
def cases(draw, fate=merges):
    """A source of random values, the batch, N, C, and a map of N tokens."""
    of, batch = Draw(draw(seeds)), draw(st.integers(1, 4))
    n, channels = draw(st.integers(1, 300)), draw(st.integers(1, 64))
    return of, batch, n, channels, of.map(batch, n, draw(st.integers(1, n)), draw(fate))


def assert_close(got: torch.Tensor, expected: torch.Tensor, largest: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[got.dtype] * largest.double().abs().max()


def groups_of(token_map: TokenMap, sample: int) -> slow_reference.Groups:
    group, head = token_map.group[sample].tolist(), token_map.head[sample].tolist()
    return [
        [h] + [token for token in range(token_map.n) if group[token] == g and token != h]
        for g, h in enumerate(head)
    ]


# The laws.


@given(cases(fates), dtypes, st.sampled_from(["mean", "direction"]))
def test_merging_what_was_unmerged_restores_it(case, dtype, how):
    of, batch, _, channels, token_map = case
    y = of.values(batch, token_map.m, channels, dtype=dtype)
    again = token_map.merge(token_map.unmerge(y), how=how)
    if dtype == torch.float32 or how == "direction":
        assert_close(again, y, y)
    else:  # Sums are taken in float32, so that half precision loses nothing at all.
        assert torch.equal(again, y)


@given(cases(fates), dtypes)
def test_merging_and_unmerging_twice_is_doing_it_once(case, dtype):
    of, batch, n, channels, token_map = case
    once = token_map.unmerge(token_map.merge(of.values(batch, n, channels, dtype=dtype)))
    assert_close(token_map.unmerge(token_map.merge(once)), once, once)


@given(cases())
def test_the_sizes_of_the_groups_sum_to_the_number_of_tokens(case):
    _, batch, n, _, token_map = case
    assert token_map.size.shape == (batch, token_map.m, 1)
    assert token_map.size.dtype == torch.float32
    assert (token_map.size.sum(1) == n).all()
    for group, size in zip(token_map.group, token_map.size, strict=True):
        assert torch.equal(group.bincount(minlength=token_map.m), size[:, 0].long())


@given(cases(fates), fates, fates)
def test_maps_compose_associatively(case, second, third):
    of, batch, _, _, a = case
    b = of.map(batch, a.m, of.integer(1, a.m), second)
    c = of.map(batch, b.m, of.integer(1, b.m), third)
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert (left.n, left.m) == (a.n, c.m)
    for name in ("group", "head", "moved", "size"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert left.drops == right.drops


@given(cases(), dtypes, st.sampled_from(["mean", "sum", "max", "head"]))
def test_a_map_that_merges_nothing_changes_nothing(case, dtype, how):
    of, batch, n, channels, token_map = case
    x = of.values(batch, n, channels, dtype=dtype)
    all_stay = of.map(batch, n, n)
    assert torch.equal(all_stay.merge(x, how=how), x)
    assert torch.equal(all_stay.unmerge(x), x)
    assert torch.equal(all_stay.then(token_map).group, token_map.group)
    assert torch.equal(
        token_map.then(of.map(batch, token_map.m, token_map.m)).group, token_map.group
    )


@given(cases(fates), dtypes)
def test_a_residual_branch_on_merged_tokens_is_that_branch_on_a_merged_residual(case, dtype):
    of, batch, n, channels, token_map = case
    x = of.values(batch, n, channels, dtype=dtype)
    mix = of.values(channels, channels, dtype=dtype)
    merged = token_map.merge(x)
    branch = torch.tanh(merged @ mix)  # Any f of one token at a time.
    got = token_map.merge(x + token_map.unmerge(branch))
    assert_close(got, merged + branch, x.abs().max() + branch.abs().max())


# What a map is.


@given(cases(fates), fates)
def test_tokens_keep_their_order_and_each_is_a_head_or_merged_or_dropped(case, second):
    of, batch, n, _, token_map = case
    for each in (token_map, token_map.then(of.map(batch, token_map.m, 1, second))):
        assert (each.head.diff(dim=1) > 0).all()
        assert torch.equal(each.group.gather(1, each.head), torch.arange(each.m).expand(batch, -1))
        for group, head, moved in zip(each.group, each.head, each.moved, strict=True):
            places = torch.cat([head, moved])
            assert len(places.unique()) == len(places)
            rest = torch.ones(n, dtype=torch.bool).index_fill(0, places, False)
            assert (group[rest] == -1).all()


@given(cases(), dtypes, st.sampled_from(["mean", "sum", "max", "head", "direction"]))
def test_merge_and_unmerge_do_what_plain_loops_do(case, dtype, how):
    of, batch, n, channels, token_map = case
    x = of.values(batch, n, min(channels, 4), dtype=dtype)
    merged, largest = token_map.merge(x, how=how), x.abs().max()
    for sample in range(batch):
        groups = groups_of(token_map, sample)
        expected = torch.tensor(slow_reference.merge(x[sample].tolist(), groups, how)).to(dtype)
        assert_close(merged[sample], expected, largest * (n if how == "sum" else 1))
        spread = slow_reference.unmerge(merged[sample].tolist(), groups, n)
        assert token_map.unmerge(merged)[sample].tolist() == spread


@given(cases(), dtypes)
def test_a_weighted_merge_does_what_plain_loops_do(case, dtype):
    of, batch, n, channels, token_map = case
    x = of.values(batch, n, min(channels, 4), dtype=dtype)
    weight = 1 + of.values(batch, n, 1).abs().mul(5).round()
    merged = token_map.merge(x, weight)
    for sample in range(batch):
        groups, weights = groups_of(token_map, sample), weight[sample, :, 0].tolist()
        expected = slow_reference.merge(x[sample].tolist(), groups, "mean", weights)
        assert_close(merged[sample], torch.tensor(expected).to(dtype), x)


@given(cases(fates), fates, st.sampled_from(["mean", "sum", "max", "head"]))
def test_merging_step_by_step_is_merging_at_once_when_weighted_by_size(case, second, how):
    of, batch, n, channels, first = case
    then = of.map(batch, first.m, of.integer(1, first.m), second)
    x = of.values(batch, n, channels)
    weight = first.size if how == "mean" else None
    stepwise = then.merge(first.merge(x, how=how), weight, how=how)
    at_once = first.then(then)
    largest = x.abs().max() * (n if how == "sum" else 1)
    assert_close(at_once.merge(x, how=how), stepwise, largest)
    assert torch.equal(at_once.unmerge(stepwise), first.unmerge(then.unmerge(stepwise)))
    assert torch.equal(at_once.size, then.merge(first.size, how="sum"))


@given(cases(), dtypes)
def test_a_merged_direction_has_the_norm_of_its_head_and_points_where_the_mean_does(case, dtype):
    of, batch, n, channels, token_map = case
    # Not so different that they could cancel out.
    x = 1 + of.values(batch, n, channels).tanh() / 2
    x = (x * 10.0 ** of.values(batch, n, 1).tanh()).to(dtype)
    merged, mean = token_map.merge(x, how="direction").double(), token_map.merge(x).double()
    heads = x.gather(1, token_map.head[..., None].expand(-1, -1, channels)).double()
    lengths = merged.norm(dim=-1), heads.norm(dim=-1)
    assert_close(lengths[0].to(dtype), lengths[1].to(dtype), lengths[1])
    directions = [y / y.norm(dim=-1, keepdim=True) for y in (merged, mean)]
    assert_close(directions[0].to(dtype), directions[1].to(dtype), torch.ones(()))


@given(cases(fates), st.integers(1, 3))
def test_a_repeated_map_does_to_every_copy_what_it_does_to_the_first(case, times):
    of, batch, n, channels, token_map = case
    x = of.values(times * batch, n, channels)
    repeated = token_map.repeat(times)
    merged = torch.cat([token_map.merge(each) for each in x.chunk(times)])
    assert torch.equal(repeated.merge(x), merged)
    unmerged = torch.cat([token_map.unmerge(each) for each in merged.chunk(times)])
    assert torch.equal(repeated.unmerge(merged), unmerged)
    assert repeated.drops == token_map.drops


def test_groups_are_numbered_by_their_first_tokens_whatever_their_labels():
    token_map = TokenMap.from_groups([[7, 3, 7, 0], [5, 5, -1, 2]])
    assert token_map.group.tolist() == [[0, 1, 0, 2], [0, 0, 1, 2]]
    assert token_map.head.tolist() == [[0, 1, 3], [0, 2, 3]]


@given(cases())
def test_a_map_can_be_made_again_from_its_groups(case):
    of, batch, n, channels, token_map = case
    again = TokenMap.from_groups(token_map.group)
    # Heads are now the groups' first tokens, which may give the groups other numbers, no more.
    for a, b in zip(again.group.tolist(), token_map.group.tolist(), strict=True):
        assert len(set(zip(a, b, strict=True))) == token_map.m
    x = of.values(batch, n, channels)
    assert_close(again.unmerge(again.merge(x)), token_map.unmerge(token_map.merge(x)), x)


# Pruning.


@given(cases(drops), dtypes, st.sampled_from(["mean", "sum", "max", "head"]))
def test_dropped_tokens_count_for_nothing_and_come_back_as_zeros(case, dtype, how):
    of, batch, n, channels, token_map = case
    x = of.values(batch, n, channels, dtype=dtype)
    kept = torch.zeros(batch, n, 1, dtype=torch.bool).scatter(1, token_map.head[..., None], True)
    merged = token_map.merge(x, how=how)
    assert torch.equal(merged, x[kept[..., 0]].view(batch, token_map.m, channels))
    assert torch.equal(token_map.unmerge(merged), x.masked_fill(~kept, 0))
    assert (token_map.size == 1).all()


def test_dropping_a_group_drops_all_its_tokens():
    pairs = TokenMap.from_groups([[0, 0, 1, 1]])
    drop_the_first = TokenMap.from_moves(2, torch.tensor([[0]]), None)
    token_map = pairs.then(drop_the_first)
    x = torch.tensor([[[float("nan")], [float("inf")], [2.0], [4.0]]])
    assert token_map.merge(x).tolist() == [[[3.0]]]
    assert token_map.merge(x, how="max").tolist() == [[[4.0]]]
    assert token_map.unmerge(torch.ones(1, 1, 1))[0, :, 0].tolist() == [0, 0, 1, 1]
    assert token_map.size.tolist() == [[[2.0]]]


# Precision.


def test_huge_groups_are_counted_and_averaged_exactly_in_half_precision():
    n = 5000
    moved = torch.arange(1, n)[None]
    token_map = TokenMap.from_moves(n, moved, torch.zeros_like(moved))
    # A sum kept in bfloat16 would stop at 256, one kept in float16 would overflow.
    for dtype, value in ((torch.bfloat16, 1.0), (torch.float16, 100.0)):
        x = torch.full((1, n, 3), value, dtype=dtype)
        assert (token_map.merge(x) == value).all()
        assert (token_map.merge(x, weight=torch.ones(1, n, 1, dtype=dtype)) == value).all()
    assert token_map.size.item() == n
    assert token_map.merge(torch.ones(1, n, 1, dtype=torch.bfloat16), how="sum").item() == 4992


def test_double_precision_stays_double():
    token_map = TokenMap.from_groups([[0, 0, 0, 1]])
    x = Draw(0).values(1, 4, 2).double() + 1e-9
    assert torch.equal(token_map.merge(x)[:, :1], x[:, :3].mean(1, keepdim=True))
    weight = torch.tensor([1.0, 1.0, 2.0, 1.0]).view(1, 4, 1)
    expected = (x[:, 0] + x[:, 1] + 2 * x[:, 2]) / 4
    torch.testing.assert_close(token_map.merge(x, weight)[:, 0], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [0.0, -2.5, 60000.0])
def test_constant_tokens_stay_what_they_are(dtype, value):
    x = torch.full((2, 40, 5), value, dtype=dtype)
    token_map = Draw(0).map(2, 40, 7)
    for merged in (token_map.merge(x), token_map.merge(x, how="max")):
        assert torch.equal(token_map.unmerge(merged), x)
    assert_close(token_map.unmerge(token_map.merge(x, how="direction")), x, x)


# Gradients.


@pytest.mark.parametrize("fate", ["merges", "drops"])
def test_gradients_of_merge_and_unmerge_are_those_of_finite_differences(fate):
    of = Draw(0)
    token_map = of.map(2, 9, 4, fate).then(of.map(2, 4, 3))
    x = of.values(2, 9, 3).double().requires_grad_()
    y = of.values(2, 3, 3).double().requires_grad_()
    weight = (1 + of.values(2, 9, 1).abs()).double().requires_grad_()
    for how in ("mean", "sum", "max", "head", "direction"):
        assert torch.autograd.gradcheck(lambda x, how=how: token_map.merge(x, how=how), x)
    assert torch.autograd.gradcheck(token_map.merge, (x, weight))
    assert torch.autograd.gradcheck(token_map.unmerge, y)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gradient_of_the_mean_is_shared_equally_by_the_group(dtype):
    token_map = TokenMap.from_groups([[0, 0, 1, 0, 0]])
    x = torch.ones(1, 5, 2, dtype=dtype, requires_grad=True)
    token_map.merge(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [0.25, 0.25, 1.0, 0.25, 0.25]


# Bad input.


def test_bad_input_is_refused_with_its_name_its_value_and_what_is_allowed():
    token_map = TokenMap.from_groups([[0, 0, 1], [0, 1, 1]])
    x, y = torch.ones(2, 3, 4), torch.ones(2, 2, 4)
    bad = {
        r"x must be of shape \[2, 3, channels\], got \[2, 2, 4\]": lambda: token_map.merge(y),
        r"x must be .*, got \[1, 3, 4\]": lambda: token_map.merge(x[:1]),
        r"x must be .*, got \[3, 4\]": lambda: token_map.merge(x[0]),
        r"y must be of shape \[2, 2, channels\], got \[2, 3, 4\]": lambda: token_map.unmerge(x),
        "how must be 'mean', 'sum', 'max', 'head' or 'direction', got 'median'": (
            lambda: token_map.merge(x, how="median")
        ),
        "weight goes with how='mean', got how='max'": lambda: token_map.merge(
            x, x[..., :1], how="max"
        ),
        r"weight must be of shape \[2, 3, 1\], got \[2, 3, 4\]": lambda: token_map.merge(x, x),
        r"other must map \[batch, tokens\] \[2, 2\], got \[2, 3\]": lambda: token_map.then(
            token_map
        ),
        r"group must be \[batch, tokens\], got shape \(2,\)": lambda: TokenMap.from_groups([0, 1]),
        r"group must have as many groups in each sample, got \[1, 2\]": lambda: (
            TokenMap.from_groups([[0, 0], [0, 1]])
        ),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
