"""Videos merge within their frames or, with across_frames, over neighbouring frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tomesd
from tests.support.recorders import AttentionRecorder
from tests.support.slow import slow
from tests.support.tiny_transformers import TINY
from tomesd.core.frames import clips, time_first, time_last
from tomesd.core.matching import random_pruning
from tomesd.core.partition import make_key
from tomesd.core.partition import random as random_partition
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.dit.video import VideoMatcher
from tomesd.diffusion.settings import DiffusionSettings

VIDEOS = [name for name, tiny in TINY.items() if tiny.frames > 1]
COGVIDEOX = TINY["CogVideoXTransformer3DModel"]


def _groups(token_map: TokenMap, sample: int = 0) -> set[frozenset[int]]:
    found: dict[int, set[int]] = {}
    for token, group in enumerate(token_map.group[sample].tolist()):
        found.setdefault(group, set()).add(token)
    found.pop(-1, None)
    return {frozenset(tokens) for tokens in found.values()}


@given(st.integers(1, 40), st.integers(1, 9))
def test_clips_are_all_of_the_video_and_none_is_too_short(frames, length):
    cut = clips(frames, length)
    assert sum(count * each for count, each in cut) == frames
    assert all(count > 0 and min(frames, length) <= each < 2 * length for count, each in cut)
    lengths = [each for _, each in cut]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_map_of_places_is_the_same_map_of_frames(frames, h, w, drops, seed):
    """Token by token: who merges with whom, and into whom."""
    torch.manual_seed(seed)
    n = frames * h * w
    if drops:
        r = seed % n
        mapped = random_pruning(2, n, random_partition(n, n_src=r, key=make_key(seed)))
    else:
        count = int(torch.randint(1, n + 1, ()))
        labels = torch.cat([torch.arange(count), torch.randint(count, (n - count,))])
        orders = [torch.randperm(n) for _ in range(2)]
        mapped = TokenMap.from_groups(torch.stack([labels[order] for order in orders]))
    tokens = torch.arange(n).view(1, n, 1).expand(2, -1, -1)
    # Which token is where when the frames of each place follow one another.
    token_at = time_last(tokens, frames, w)[..., 0]
    assert token_at[0].tolist() == [
        (t * h + y) * w + x for y in range(h) for x in range(w) for t in range(frames)
    ]
    result = time_first(mapped, frames)
    for sample in range(2):
        expected = {
            frozenset(token_at[sample, i].item() for i in group)
            for group in _groups(mapped, sample)
        }
        assert _groups(result, sample) == expected
        heads = {token_at[sample, i].item() for i in mapped.head[sample].tolist()}
        assert set(result.head[sample].tolist()) == heads
        moved = {token_at[sample, i].item() for i in mapped.moved[sample].tolist()}
        assert set(result.moved[sample].tolist()) == moved
    # The laws of a map: numbered by heads, each head in its group, and sizes that count.
    assert torch.equal(result.head, result.head.sort(1).values)
    own = result.group.gather(1, result.head)
    assert torch.equal(own, torch.arange(result.m).expand_as(own))
    for sample in range(2):
        counted = [(result.group[sample] == group).sum() for group in range(result.m)]
        assert result.size[sample, :, 0].tolist() == counted


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 13])
@pytest.mark.parametrize(
    "how", [{}, {"use_rand": True}, {"method": "prune"}, {"partition": "alternating"}], ids=str
)
def test_as_many_tokens_merge_as_the_settings_say(frames, how):
    chosen = DiffusionSettings(ratio=0.5, across_frames=True, **how)
    matching = VideoMatcher(chosen)
    x = torch.randn(2, frames * 5 * 7, 8, generator=torch.Generator().manual_seed(0))
    found = matching.token_map(x, (frames, 5, 7), 0.5, make_key(0))
    assert found.n == frames * 35
    assert found.n - found.m == matching.merged(0.5, (frames, 5, 7))
    # Half of the tokens of each clip, rounded down.
    lost = found.n // 2 - (found.n - found.m)
    assert 0 <= lost <= len(clips(frames, 4)) * max(1, frames // 4)


def test_a_picture_merges_as_it_would_without():
    x = torch.randn(2, 35, 8)
    maps = [
        VideoMatcher(DiffusionSettings(across_frames=across)).token_map(x, (1, 5, 7), 0.5, None)
        for across in (False, True)
    ]
    assert torch.equal(maps[0].group, maps[1].group)
    assert torch.equal(maps[0].head, maps[1].head)
    tiny = TINY["SD3Transformer2DModel"]
    with torch.no_grad():
        expected = tiny.call(tomesd.apply_patch(tiny.build()))
        assert torch.equal(
            tiny.call(tomesd.apply_patch(tiny.build(), across_frames=True)), expected
        )


def _still(frames: int) -> dict:
    """A video that stands still; without positions, so that its frames are alike all through."""
    one = torch.randn(2, 1, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": one.expand(-1, frames, -1, -1, -1), "image_rotary_emb": None}


@pytest.mark.parametrize("frames", [4, 5, 8, 13])
@torch.no_grad()
def test_a_still_video_merges_across_frames_without_loss(frames):
    """In float32; within the frames only it could not."""
    model = COGVIDEOX.build()
    expected = COGVIDEOX.call(model, **_still(frames))
    tomesd.apply_patch(model, ratio=0.5)
    within = (COGVIDEOX.call(model, **_still(frames)) - expected).abs().max()
    tomesd.apply_patch(model, ratio=0.5, across_frames=True)
    with tomesd.trace(model) as traced:
        across = (COGVIDEOX.call(model, **_still(frames)) - expected).abs().max()
    assert across < 1e-4 < within
    for record in traced:
        for sample in record.patches.flatten(2):
            # Each group is of one place: [frames, places].
            places = [set(place.tolist()) for place in sample.T]
            assert sum(map(len, places)) == len(set.union(*places)) <= -(-frames * 35 // 2) + 3


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_every_family_of_videos_merges_across_frames(name):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5, across_frames=True)
    with tomesd.trace(model) as traced:
        output = tiny.call(model)
    assert output.isfinite().all()
    assert torch.equal(tiny.call(model), output)
    for record in traced:
        frames_of_groups = [
            {int(t) for t in (sample == group).nonzero()[:, 0]}
            for sample in record.patches
            for group in sample.unique()
        ]
        assert max(map(len, frames_of_groups)) > 1
        for sample in record.patches:
            assert len(sample.unique()) == tiny.frames * 35 - tiny.frames * 35 // 2
    with AttentionRecorder() as attention:
        tiny.call(model)
    gone = tiny.frames * 35 // 2
    before = AttentionRecorder()
    with before:
        tiny.call(tiny.build())
    merged = [
        was - left
        for (was, _), (left, _) in zip(before.seen, attention.seen, strict=True)
        if was >= tiny.frames * 35
    ]
    assert sorted(merged) == [0] * tiny.untouched + [gone] * (len(merged) - tiny.untouched)
    (rows,) = tomesd.report(model).rows.values()
    assert {row.tokens - row.merged for row in rows if not row.note.startswith("they")} == {gone}


@slow
@torch.no_grad()
def test_merging_across_frames_is_one_graph():
    torch.compiler.reset()
    model = tomesd.apply_patch(COGVIDEOX.build(), across_frames=True)
    still = {"hidden_states": torch.randn(2, 5, 4, 10, 14), "image_rotary_emb": None}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(COGVIDEOX.call(compiled, **still), COGVIDEOX.call(model, **still))
    torch.compiler.reset()


def test_across_frames_is_a_yes_or_no():
    with pytest.raises(TypeError, match="across_frames must be bool, got 4"):
        tomesd.apply_patch(COGVIDEOX.build(), across_frames=4)
