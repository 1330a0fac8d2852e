"""How many tokens merge in each layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomesd.vit.schedule import Cost, clipped, for_speedup, per_layer, tokens_after

VIT_B = Cost(attention=4 * 768**2, pairs=2 * 768, mlp=8 * 768**2)
VIT_L = Cost(attention=4 * 1024**2, pairs=2 * 1024, mlp=8 * 1024**2)


def test_an_int_is_the_same_in_every_layer():
    assert per_layer(8, 4) == [8, 8, 8, 8]


def test_a_list_is_taken_as_it_is():
    assert per_layer([5, 0, 7], 3) == [5, 0, 7]


@given(r=st.integers(0, 40), layers=st.integers(1, 40))
def test_the_decreasing_schedule_falls_from_2r_to_0_on_a_line(r, layers):
    got = per_layer((r, -1), layers)
    assert got == sorted(got, reverse=True)
    line = [2 * r * (1 - i / (layers - 1)) for i in range(layers)] if layers > 1 else [2 * r]
    # Rounded down, as in the paper's code; floats may miss a whole number by a little.
    assert all(-1e-9 <= b - a < 1 + 1e-9 for a, b in zip(got, line, strict=True))


@given(r=st.integers(0, 40), inflection=st.floats(-1, 1), layers=st.integers(2, 40))
def test_an_inflection_merges_as_many_tokens_as_the_constant_schedule(r, inflection, layers):
    got = per_layer((r, inflection), layers)
    assert all(value >= 0 for value in got)
    # Each layer is rounded separately.
    assert 0 <= r * layers - sum(got) <= layers


def test_inflection_0_is_constant_and_1_the_decreasing_schedule_turned_round():
    assert per_layer((8, 0), 12) == [8] * 12
    assert per_layer((8, 1), 12) == per_layer((8, -1), 12)[::-1]


def test_the_decreasing_schedule_rounds_down_as_the_paper_s_code_does():
    assert per_layer((16, -1), 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]


def test_any_inflection_rounds_its_ends_first_as_the_paper_s_code_does():
    assert per_layer((13, 0.3), 5) == [9, 11, 13, 15, 17]
    assert per_layer((1, -0.9), 2) == [1, 1]
    assert per_layer((5, -1), 6) == [10, 8, 6, 4, 2, 0]


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "r must be 0 or more, got -1"),
        (1.5, TypeError, "r must be an int"),
        (True, TypeError, "r must be an int"),
        ("8", TypeError, "r must be an int"),
        (None, TypeError, "r must be an int"),
        ([1, 2], ValueError, "r must have one number for each of 3 layers"),
        ([1, 2, -3], ValueError, "r must be 0 or more"),
        ([1, 2, 3.0], TypeError, "with an int for each layer"),
        ((8,), ValueError, r"r as a tuple must be \(r, inflection\)"),
        ((8, -2), ValueError, "inflection must be from -1 to 1"),
        ((8, "down"), TypeError, "inflection must be a number"),
        ((-8, -1), ValueError, "r must be 0 or more"),
    ],
)
def test_an_invalid_schedule_is_refused_with_the_valid_forms(r, error, message):
    with pytest.raises(error, match=message):
        per_layer(r, 3)


@given(r=st.integers(0, 300), tokens=st.integers(1, 300), prefix=st.integers(0, 1))
def test_at_most_half_of_the_unprotected_tokens_merge(r, tokens, prefix):
    merges = clipped(r, tokens, prefix)
    assert 0 <= merges <= r
    assert 2 * merges <= tokens - prefix
    assert merges == r or 2 * (merges + 1) > tokens - prefix


def test_a_model_never_runs_out_of_tokens():
    assert tokens_after([100] * 6, tokens=197, prefix=1) == [99, 50, 26, 14, 8, 5]


def test_the_paper_s_speed_ups_are_reached_with_about_the_paper_s_r():
    """ToMe measured 1.95 with ViT-B/16 and r=16, and 1.96 with ViT-L/16 and r=8."""
    assert for_speedup(1.95, VIT_B, layers=12, tokens=197, prefix=1) in (15, 16)
    assert for_speedup(1.96, VIT_L, layers=24, tokens=197, prefix=1) in (8, 9)


@given(speedup=st.floats(1, 3))
def test_the_speed_up_is_reached_and_no_smaller_r_reaches_it(speedup):
    def reached(r: int) -> float:
        return VIT_B.of([0] * 12, 197, 1) / VIT_B.of([r] * 12, 197, 1)

    r = for_speedup(speedup, VIT_B, layers=12, tokens=197, prefix=1)
    assert reached(r) >= speedup
    assert r == 0 or reached(r - 1) < speedup


@pytest.mark.parametrize(
    ("speedup", "message"),
    [(0.5, "speedup must be 1 or more, got 0.5"), (50, "speedup must be at most .* got 50")],
)
def test_a_speed_up_out_of_reach_is_refused_with_what_can_be_reached(speedup, message):
    with pytest.raises(ValueError, match=message):
        for_speedup(speedup, VIT_B, layers=12, tokens=197, prefix=1)
