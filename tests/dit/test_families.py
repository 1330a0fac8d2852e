"""Diffusion transformers of diffusers' own classes: each merges at any size and is left as it was.

For every family, for square, oblong and indivisible grids, and batches of two, one and three.
"""

import copy
import io
import pickle
from functools import partial

import pytest
import torch

import tomesd
from tests.support.recorders import count_hooks
from tests.support.slow import TRANSFORMER_KINDS
from tests.support.threads import side_by_side
from tests.support.tiny_transformers import DIT, TINY

GRIDS = [(6, 6), (4, 9), (5, 7)]


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


@pytest.fixture(params=sorted(TRANSFORMER_KINDS & set(TINY)))
def kind(request):
    return TINY[request.param]


@pytest.mark.parametrize(("grid", "batch"), zip(GRIDS, (2, 1, 3), strict=True), ids=str)
def test_it_merges_at_every_size(tiny, grid, batch):
    size = {"batch": batch, "h": grid[0], "w": grid[1]}
    model = tiny.build()
    expected, before = tiny.predict(model, **size), tiny.attention(model, **size)
    tomesd.apply_patch(model, ratio=0.5)
    output, after = tiny.predict(model, **size), tiny.attention(model, **size)
    assert output.shape == expected.shape
    assert output.isfinite().all()
    assert not torch.equal(output, expected)
    # Half of each picture's tokens, and none of the text's.
    gone = tiny.frames * (grid[0] * grid[1] // 2)
    whole = tiny.frames * grid[0] * grid[1]
    merged = [was - left for (was, _), (left, _) in zip(before, after, strict=True) if was >= whole]
    assert sorted(merged) == [0] * tiny.untouched + [gone] * (len(merged) - tiny.untouched)
    assert sum(merged) > 0
    smaller = [(pair, now) for pair, now in zip(before, after, strict=True) if pair[0] < whole]
    assert all(pair == now for pair, now in smaller)
    assert torch.equal(tiny.predict(model, **size), output)


def test_without_proportional_attention_keys_merge_as_queries_do(tiny):
    model = tomesd.apply_patch(tiny.build(), ratio=0.5, prop_attn=False)
    gone = tiny.frames * (35 // 2)
    seen = zip(tiny.attention(tiny.build()), tiny.attention(model), strict=True)
    merged = [(before, after) for before, after in seen if before != after]
    # In cross-attention there are fewer keys, those of the text.
    assert any(before[0] <= before[1] for before, _ in merged)
    for (was_queries, was_keys), (queries, keys) in merged:
        assert was_queries - queries == gone
        assert was_keys - keys == (gone if was_keys >= was_queries else 0)


def test_removing_the_patch_restores_the_output_bit_for_bit(tiny):
    model = tiny.build()
    expected, keys, own = tiny.predict(model), set(model.state_dict()), count_hooks(model)
    tomesd.apply_patch(model)
    tiny.predict(model)
    assert set(model.state_dict()) == keys
    assert not torch.equal(tiny.predict(model), expected)
    tomesd.remove_patch(model)
    assert torch.equal(tiny.predict(model), expected)
    assert count_hooks(model) == own


def test_a_ratio_of_zero_changes_nothing(tiny):
    model = tiny.build()
    expected = tiny.predict(model)
    assert torch.equal(tiny.predict(tomesd.apply_patch(model, ratio=0)), expected)


def test_every_random_way_of_merging_is_a_function_of_the_seed(kind):
    for way in ({"use_rand": True}, {"method": "prune"}):
        model = tomesd.apply_patch(kind.build(), **way)
        output = kind.predict(model)
        assert output.isfinite().all()
        torch.manual_seed(1)
        assert torch.equal(kind.predict(model), output)
        other = kind.predict(tomesd.apply_patch(model, seed=1, **way))
        assert not torch.equal(other, output)


def test_copies_and_pickles_of_a_patched_model_have_patches_of_their_own(kind):
    model = tomesd.apply_patch(kind.build())
    expected = kind.predict(model)
    for other in (copy.deepcopy(model), _pickled(model)):
        assert torch.equal(kind.predict(other), expected)
        tomesd.remove_patch(other)
        assert not torch.equal(kind.predict(other), expected)
    assert torch.equal(kind.predict(model), expected)


def _pickled(model):
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    return pickle.load(file)


def test_threads_that_share_a_model_do_not_mix_their_sizes(kind):
    model = tomesd.apply_patch(kind.build())
    sizes = [{"h": 4, "w": 9}, {"h": 9, "w": 4}, {"h": 5, "w": 7}]
    expected = [kind.predict(model, **size) for size in sizes]
    outputs = side_by_side([partial(kind.predict, model, **size) for size in sizes], times=4)
    for output, want in zip(outputs, expected, strict=True):
        assert all(torch.equal(each, want) for each in output)


def test_a_report_says_what_merges(tiny):
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    tiny.predict(model)
    (rows,) = tomesd.report(model).rows.values()
    merging = [row for row in rows if row.merged < row.tokens]
    assert merging
    assert {row.tokens for row in merging} == {tiny.frames * 35}
    assert {row.merged for row in merging} == {tiny.frames * 18}
    assert all(0 < row.work < 0.8 for row in merging)


def test_half_precision_stays_half(tiny):
    model = tomesd.apply_patch(tiny.build().bfloat16())
    output = tiny.predict(model)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_a_trace_shows_what_merged_in_each_block(tiny):
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    expected = tiny.predict(model)
    with tomesd.trace(model) as traced:
        assert torch.equal(tiny.predict(model), expected)
        tiny.predict(model)
    blocks = len(model._tomesd_patch.blocks)
    assert [record.step for record in traced] == [0] * blocks + [1] * blocks
    grid = (5, 7) if tiny.frames == 1 else (tiny.frames, 5, 7)
    for record in traced:
        assert record.patches.shape[1:] == grid
        for sample in record.patches:
            assert len(sample.unique()) == tiny.frames * 18
    assert count_hooks(tomesd.remove_patch(model)) == count_hooks(tiny.build())


@pytest.mark.parametrize("ratio", [0.5, 1 / 36])
def test_dit_merges_the_square_pictures_that_it_knows(ratio):
    model, size = DIT.build(), {"h": 6, "w": 6}
    expected = DIT.predict(model, **size)
    tomesd.apply_patch(model, ratio=ratio)
    output = DIT.predict(model, **size)
    assert output.shape == expected.shape
    assert output.isfinite().all()
    assert not torch.equal(output, expected)
    left = 36 - int(ratio * 36)
    assert DIT.attention(model, **size) == [(left, left)] * 2
    tomesd.remove_patch(model)
    assert torch.equal(DIT.predict(model, **size), expected)
