"""calibrate finds a ratio for each block, which apply_patch takes."""

import doctest
import json

import pytest
import torch

import tomesd
from tests.support.slow import slow
from tests.support.tiny_pipelines import sample, sd_pipeline
from tomesd import calibration
from tomesd.calibration import counting, greedy

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module", autouse=True)
def two_ratios():
    """A third of the forwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_RATIOS", (0.25, 0.75))
        yield


@pytest.fixture(scope="module")
def pipe():
    return sd_pipeline()


@pytest.fixture(scope="module")
def ratios(pipe) -> dict[str, float]:
    return tomesd.calibrate(pipe, PROMPTS, speedup=1.1, samples=1, num_inference_steps=1)


def flops(pipe) -> int:
    recorded = calibration.record(pipe, pipe.unet, PROMPTS, 1, num_inference_steps=1)
    ((args, kwargs),) = recorded.calls
    with torch.no_grad(), counting() as counter:
        pipe.unet(*args, **kwargs)
    return counter.get_total_flops()


def test_the_ratios_reach_the_speedup_and_go_through_json(pipe, ratios):
    whole = flops(pipe)
    with tomesd.patched(pipe, ratio=json.loads(json.dumps(ratios))):
        assert whole / flops(pipe) == pytest.approx(1.1, abs=0.05)
        merged = sum(row.merged < row.tokens for row in tomesd.report(pipe).rows["unet"])
    assert merged == len(ratios)


@slow
def test_calibrating_changes_nothing_and_is_the_same_twice(pipe, ratios):
    before = sample(pipe)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    again = tomesd.calibrate(pipe, PROMPTS, speedup=1.1, samples=1, num_inference_steps=1)
    assert again == ratios
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample(pipe), before)
    with pytest.raises(ValueError, match="model must be patched"):
        tomesd.report(pipe)


def test_what_differs_between_both_halves_counts_as_guidance_makes_it_count(pipe):
    recorded = calibration.record(pipe, pipe.unet, PROMPTS, 1, num_inference_steps=1)
    assert recorded.guidance == 7.5
    half = torch.randn(2, 3)
    assert torch.equal(recorded.guided(torch.cat([half, half])), half)
    torch.testing.assert_close(recorded.guided(torch.cat([0 * half, half])), 7.5 * half)
    one = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert calibration.record(pipe, pipe.unet, PROMPTS, 1, **one).guidance == 1


def test_a_lower_threshold_of_similarity_merges_more(pipe):
    found = [
        tomesd.calibrate(pipe, PROMPTS, similarity=s, samples=1, num_inference_steps=1)
        for s in (0.999, 0.5, -0.999)
    ]
    assert sum(found[0].values()) < sum(found[1].values()) <= sum(found[2].values())
    assert set(found[2].values()) == {0.75}


def test_the_greedy_choice_saves_enough_and_takes_the_cheapest_first():
    assert doctest.testmod(calibration, optionflags=doctest.SKIP).failed == 0
    curves = {
        "cheap": [(0.0, 0.0, 0.0), (0.25, 1.0, 10.0), (0.5, 2.0, 20.0)],
        "dear": [(0.0, 0.0, 0.0), (0.25, 50.0, 10.0), (0.5, 60.0, 20.0)],
        "saves nothing": [(0.0, 0.0, 0.0), (0.25, 0.0, 0.0)],
    }
    assert greedy(curves, 15.0) == {"cheap": 0.375}
    # A dear block is better taken at once as far as it goes.
    assert greedy(curves, 30.0) == {"cheap": 0.5, "dear": 0.25}
    assert greedy(curves, 99.0) == {"cheap": 0.5, "dear": 0.5}


def test_a_block_merges_at_its_own_ratio_and_others_not_at_all(pipe):
    name = "up_blocks.2.attentions.0"
    with tomesd.patched(pipe, ratio={name: 0.25}):
        rows = tomesd.report(pipe).rows["unet"]
    merging = [(row.where, row.merged / row.tokens) for row in rows if row.merged < row.tokens]
    assert merging == [("1/1 up_blocks.2", 0.75)]


def test_blocks_can_have_schedules_and_presets(pipe, ratios):
    tomesd.apply_patch(pipe, ratio=ratios, preset="late", only_where_it_pays=False)
    notes = {row.note for row in tomesd.report(pipe).rows["unet"] if row.merged < row.tokens}
    assert all(note.startswith("ratio 0, ") for note in notes)
    unpatched = sample(tomesd.remove_patch(pipe))
    late = {name: tomesd.RatioSchedule.last(ratio, since=0.5) for name, ratio in ratios.items()}
    with tomesd.patched(pipe, ratio=late):
        assert not torch.equal(sample(pipe), unpatched)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "speedup or similarity must be given"),
        ({"speedup": 1.1, "similarity": 0.9}, TypeError, "speedup or similarity must be given"),
        ({"speedup": 1.0}, ValueError, "speedup must be above 1 and below inf, got 1.0"),
        ({"speedup": "fast"}, TypeError, "speedup must be float, got 'fast'"),
        ({"similarity": 2.0}, ValueError, "similarity must be above -1 and below 1, got 2.0"),
        ({"speedup": 1.1, "samples": 0}, ValueError, "samples must be 1 or more, got 0"),
        ({"speedup": 9.0, "num_inference_steps": 1}, ValueError, "speedup must be at most 1"),
    ],
)
def test_bad_arguments_are_named(pipe, options, error, message):
    with pytest.raises(error, match=message):
        tomesd.calibrate(pipe, PROMPTS, **options)


def test_what_cannot_be_calibrated_is_said(pipe):
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline with one denoiser"):
        tomesd.calibrate(pipe.unet, PROMPTS, speedup=1.1)
    with pytest.raises(ValueError, match="prompts must hold one prompt or more, got none"):
        tomesd.calibrate(pipe, [], speedup=1.1)
    with pytest.raises(ValueError, match=r"names of blocks that can merge, such as down_.*'up'"):
        tomesd.apply_patch(pipe, ratio={"up": 0.5})
