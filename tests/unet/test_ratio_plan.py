"""Ratios that differ from level to level and from step to step."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from tomesd import RatioSchedule
from tomesd.diffusion.ratio_plan import RatioPlan
from tomesd.diffusion.ratio_schedule import MOST_PIECES, normal_ratio
from tomesd.diffusion.scheduler_steps import SchedulerSteps

RATIOS = st.floats(0, 0.75)


class Pipe(SimpleNamespace):
    """All that a schedule needs of a pipeline."""


@given(start=RATIOS, end=RATIOS, pieces=st.integers(2, MOST_PIECES))
def test_a_ramp_begins_and_ends_at_its_ratios_and_is_monotonic(start, end, pieces):
    ratios = [ratio for _, ratio in RatioSchedule.ramp(start, end, pieces).pieces]
    assert ratios[0] == start
    assert ratios[-1] == pytest.approx(end)
    assert ratios == sorted(ratios, reverse=start > end) or max(ratios) - min(ratios) < 1e-12


@given(schedule=st.builds(RatioSchedule.ramp, RATIOS, RATIOS, st.integers(2, 4)), other=RATIOS)
def test_stages_of_several_levels_keep_each_level_at_its_own_ratio(schedule, other):
    pipe = Pipe(scheduler=EulerDiscreteScheduler())
    first = RatioSchedule.first(other, until=0.5)
    plan = RatioPlan({1: schedule, 2: first, 4: other}, pipe)
    for end, of_ramp, of_first, constant in zip(
        plan.ends, *(plan.of_level(level).by_stage for level in (1, 2, 4)), strict=True
    ):
        assert of_ramp == next(ratio for until, ratio in schedule.pieces if end <= until)
        assert of_first == (other if end <= 0.5 else 0)
        assert constant == other
    assert set(plan.of_level(8).by_stage) == {0.0}


def test_first_and_last_meet_and_leave_no_step_out():
    first, last = RatioSchedule.first(0.5, until=0.4), RatioSchedule.last(0.5, since=0.4)
    assert [a + b for (_, a), (_, b) in zip(first.pieces, last.pieces, strict=True)] == [0.5, 0.5]
    assert last.pieces[0] == (0.4, 0)


@pytest.mark.parametrize("steps", [5, 10, 25])
@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_a_schedule_counts_the_steps_of_every_kind_of_scheduler(scheduler, steps):
    pipe = Pipe(scheduler=scheduler())
    pipe.scheduler.set_timesteps(steps)
    x = torch.zeros(1, 4, 2, 2)
    seen = []
    for timestep in pipe.scheduler.timesteps:
        seen.append(SchedulerSteps(pipe).progress(timestep))
        x = pipe.scheduler.step(torch.ones_like(x), timestep, x).prev_sample
    assert seen == pytest.approx([i / steps for i in range(steps)])


def test_a_schedule_counts_pndms_steps_which_visits_one_timestep_twice():
    pipe = Pipe(scheduler=PNDMScheduler(skip_prk_steps=True))
    pipe.scheduler.set_timesteps(10)
    seen = [SchedulerSteps(pipe).progress(timestep) for timestep in pipe.scheduler.timesteps]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(10 / 11)


def test_a_picture_that_starts_halfway_starts_halfway_in_the_schedule():
    pipe = Pipe(scheduler=EulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(20)
    pipe.scheduler.set_begin_index(10)
    assert SchedulerSteps(pipe).progress(pipe.scheduler.timesteps[10]) == 0.5


def test_steps_that_a_copy_of_the_scheduler_takes_are_known_by_their_timesteps():
    pipe = Pipe(scheduler=UniPCMultistepScheduler())
    pipe.scheduler.set_timesteps(10)
    steps = SchedulerSteps(pipe)
    # SkyReels gives each frame a timestep of its own, and the last frames are the noisiest.
    seen = [steps.progress(torch.stack([each // 2, each])) for each in pipe.scheduler.timesteps]
    assert seen == pytest.approx([i / 10 for i in range(10)])
    assert steps.unknown == 0
    assert [steps.progress(torch.tensor(0.5)) for _ in range(3)] == [0, 0, 0]
    assert steps.unknown == 3


def test_a_first_timestep_in_another_unit_is_not_taken_for_a_later_one():
    pipe = Pipe(scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(4)
    timesteps = pipe.scheduler.timesteps
    assert (timesteps[0], timesteps[-1]) == (1000, 1)
    assert SchedulerSteps(pipe).progress(timesteps[0] / 1000) == 0


@pytest.mark.parametrize(
    ("ratio", "error", "words"),
    [
        ("0.5", TypeError, "ratio must be a float"),
        ({}, ValueError, "ratio by level"),
        ({0: 0.5}, ValueError, "ratio by level"),
        ({"1": 0.5}, ValueError, "ratio by level"),
        ({1: None}, TypeError, "ratio must be a float"),
        (RatioSchedule.first(0.5, until=0.4), TypeError, "a schedule needs apply_patch"),
        (
            {
                1: lambda p: p / 2,
                2: RatioSchedule.first(0.5, 0.3),
                4: RatioSchedule.ramp(0.1, 0.2, 6),
            },
            ValueError,
            "ratio must change at most 5 times",
        ),
    ],
)
def test_an_invalid_ratio_is_refused(ratio, error, words):
    with pytest.raises(error, match=words):
        RatioPlan(normal_ratio(ratio), None)


@pytest.mark.parametrize(
    ("pieces", "error", "words"),
    [
        ((), ValueError, "pieces must be 1 to 6, got 0"),
        (((0.5, 0.5),), ValueError, "the last at 1"),
        (((0.6, 0.5), (0.5, 0.2), (1, 0)), ValueError, "rising"),
        (((0, 0.5), (1, 0)), ValueError, "rising"),
        ((("a", 0.5), (1, 0)), TypeError, "pairs of numbers"),
        (((1, True),), TypeError, "pairs of numbers"),
        (tuple(((i + 1) / 7, 0.5) for i in range(7)), ValueError, "got 7"),
    ],
)
def test_invalid_pieces_are_refused(pieces, error, words):
    with pytest.raises(error, match=words):
        RatioSchedule(pieces)


@pytest.mark.parametrize("pieces", [0, 7, 1.5, "4"])
def test_a_number_of_pieces_out_of_range_is_refused(pieces):
    for make in (
        lambda: RatioSchedule.ramp(0.5, 0.1, pieces=pieces),
        lambda: RatioSchedule.of(lambda progress: 0.5, pieces=pieces),
    ):
        with pytest.raises(
            ValueError, match=f"pieces must be a whole number from 1 to 6, got {pieces!r}"
        ):
            make()
