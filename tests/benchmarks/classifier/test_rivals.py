"""The rivals of bipartite matching and the distances are those that their papers define."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.classifier import distances, rivals
from benchmarks.classifier.distances import matching_by_distance, sequential
from benchmarks.classifier.rivals import (
    attention_pruning,
    energy_matching,
    greedy_matching,
    kmeans,
    received_attention,
)
from tomesd import TokenMap
from tomesd.core import partition


def test_every_docstring_example_is_right():
    for module in (rivals, distances):
        result = doctest.testmod(module, extraglobs={"torch": torch})
        assert result.attempted > 0
        assert result.failed == 0


@st.composite
def cases(draw) -> tuple[Tensor, int, int]:
    """A metric [2, N, C], how many tokens are protected, and r."""
    n, prefix = draw(st.integers(4, 24)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    metric = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    return metric, prefix, draw(st.integers(0, (n - prefix) // 2))


def groups_of(token_map: TokenMap, sample: int) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for token, group in enumerate(token_map.group[sample].tolist()):
        groups.setdefault(group, set()).add(token)
    return {frozenset(group) for group in groups.values()}


def joined(n: int, into: dict[int, int]) -> set[frozenset[int]]:
    """The groups in which each token of `into` joins another, that joins none itself."""
    heads = [i for i in range(n) if i not in into]
    return {frozenset([head] + [i for i in into if into[i] == head]) for head in heads}


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


RIVALS = {
    "greedy": greedy_matching,
    "kmeans": kmeans,
    "energy": lambda metric, prefix, r: energy_matching(metric, prefix, r, margin=0.5),
    "attention": lambda metric, prefix, r: attention_pruning(metric[..., 0], prefix, r),
}


@pytest.mark.parametrize("rival", RIVALS)
@given(case=cases())
def test_every_rival_removes_r_tokens_and_no_protected_one(rival, case):
    metric, prefix, r = case
    got = RIVALS[rival](metric, prefix, r)
    assert got.m == metric.shape[1] - r
    for sample in range(2):
        assert {frozenset([i]) for i in range(prefix)} <= groups_of(got, sample)
        kept = got.group[sample][got.group[sample] >= 0]
        assert kept.unique().tolist() == list(range(got.m))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("r", [-1, 20])
def test_an_r_out_of_range_is_refused(rival, r):
    with pytest.raises(ValueError, match=f"r must be from 0 to .*, got {r}"):
        RIVALS[rival](torch.randn(1, 8, 3), 1, r)


@given(case=cases())
def test_greedy_matching_takes_the_most_similar_remaining_pair(case):
    metric, prefix, r = case
    got = greedy_matching(metric, prefix, r)
    for sample, tokens in enumerate(metric):
        left, into = list(range(prefix, len(tokens))), {}
        for _ in range(r):
            pairs = [(cosine(tokens[i], tokens[j]), i, j) for i in left for j in left if i < j]
            _, i, j = max(pairs)
            into[j] = i
            left = [token for token in left if token not in (i, j)]
        assert groups_of(got, sample) == joined(len(tokens), into)


@given(case=cases(), iterations=st.integers(1, 5))
def test_kmeans_assigns_tokens_to_the_nearest_centre_in_each_iteration(case, iterations):
    metric, prefix, r = case
    got = kmeans(metric, prefix, r, iterations)
    for sample, tokens in enumerate(metric):
        free = len(tokens) - prefix
        clusters = free - r
        seeds = [prefix + i * free // clusters for i in range(clusters)]
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        centres = {seed: unit[seed] for seed in seeds}
        for _ in range(iterations):
            into = {
                i: max(seeds, key=lambda seed, i=i: cosine(unit[i], centres[seed]))
                for i in range(prefix, len(tokens))
                if i not in seeds
            }
            centres = {
                seed: torch.stack([unit[seed]] + [unit[i] for i in into if into[i] == seed]).mean(0)
                for seed in seeds
            }
        assert groups_of(got, sample) == joined(len(tokens), into)


def test_kmeans_needs_an_iteration():
    with pytest.raises(ValueError, match="iterations must be 1 or more, got 0"):
        kmeans(torch.randn(1, 8, 3), 0, 2, iterations=0)


@given(case=cases(), margin=st.floats(0, 0.9))
def test_energy_matching_merges_tokens_of_high_energy_and_protects_others(case, margin):
    metric, prefix, r = case
    got = energy_matching(metric, prefix, r, margin)
    for sample, tokens in enumerate(metric):
        free = range(prefix, len(tokens))

        def counts(similarity: float) -> float:
            below = math.exp(similarity - margin) - 1
            return similarity if similarity >= margin else below

        energy = {i: sum(counts(cosine(tokens[i], tokens[j])) for j in free) for i in free}
        crowd = sorted(free, key=lambda i: -energy[i])[: 2 * r]
        src, dst = crowd[::2], crowd[1::2]
        into = {i: max(dst, key=lambda j, i=i: cosine(tokens[i], tokens[j])) for i in src}
        assert groups_of(got, sample) == joined(len(tokens), into)


def test_attention_pruning_drops_what_receives_the_least_attention():
    attention = torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2]])
    pruned = attention_pruning(attention, prefix=1, r=2)
    tokens = torch.arange(1.0, 6.0).view(1, 5, 1)
    assert pruned.unmerge(pruned.merge(tokens)).flatten().tolist() == [1, 2, 0, 4, 0]


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_attention_is_received_from_the_class_token_or_without_one_from_all(prefix):
    q, k = torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 4)
    for sample in range(2):
        rows = [
            (q[sample, i, head] @ k[sample, :, head].T / 2).softmax(-1)
            for head in range(3)
            for i in (range(9) if prefix == 0 else [0])
        ]
        expected = torch.stack(rows).mean(0)
        torch.testing.assert_close(received_attention(q, k, prefix)[sample], expected)


def softmax_over(similarity, a, targets):
    weights = [math.exp(similarity(a, b)) for b in targets]
    return [w / sum(weights) for w in weights]


SIMILARITY = {
    "cosine": cosine,
    "dot": lambda a, b: (a @ b).item(),
    "euclidean": lambda a, b: -(a - b).norm().item(),
    "softmax": lambda a, b: (a @ b).item() / math.sqrt(len(a)),
}


@pytest.mark.parametrize("distance", SIMILARITY)
@given(case=cases())
def test_matching_uses_the_given_distance(distance, case):
    metric, prefix, r = case
    n = metric.shape[1]
    sides = partition.alternating(n, prefix=prefix)
    r = min(r, len(sides.src))
    got = matching_by_distance(metric, sides, r, distance)
    src, dst = sides.src.tolist(), sides.dst.tolist()
    for sample, tokens in enumerate(metric):
        edges = []
        for i in src:
            if distance == "softmax":
                scores = softmax_over(SIMILARITY[distance], tokens[i], [tokens[j] for j in dst])
            else:
                scores = [SIMILARITY[distance](tokens[i], tokens[j]) for j in dst]
            edges.append((max(scores), i, dst[scores.index(max(scores))]))
        edges.sort(reverse=True)
        into = {i: j for _, i, j in edges[:r]}
        assert groups_of(got, sample) == joined(n, into)


@pytest.mark.parametrize("distance", SIMILARITY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_distance_finds_equal_tokens_in_half_precision(distance, dtype):
    metric = torch.eye(8, dtype=dtype)[None].repeat(1, 2, 1) * 4
    sides = sequential(16)
    got = matching_by_distance(metric, sides, 8, distance)
    assert got.group[0, :8].tolist() == got.group[0, 8:].tolist()


def test_an_unknown_distance_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"distance must be one of cosine, dot, .* got 'l1'"):
        matching_by_distance(torch.randn(1, 4, 3), partition.alternating(4), 1, "l1")
