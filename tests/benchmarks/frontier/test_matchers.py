"""The plain grid keeps one token of each cell, and schedules are the library's own."""

import pytest
import torch

from benchmarks.frontier.candidates import LATE, Candidate
from benchmarks.frontier.matchers import GridMatcher, PoolingGridMatcher
from tests.support.tiny_pipelines import scheduler, sd_pipeline
from tomesd import RatioSchedule, patched
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.pictures.sampling import Sampling, sample

HOW = Sampling(steps=5, guidance=3.0, width=32, height=32)


@pytest.mark.parametrize(
    ("matcher", "h", "w"),
    [(GridMatcher, 4, 6), (PoolingGridMatcher, 4, 6), (PoolingGridMatcher, 5, 7)],
)
def test_a_grid_keeps_one_token_of_each_cell(matcher, h, w):
    settings = DiffusionSettings(ratio=0.75, merge_block=False, merge_queries=False)
    x = torch.randn(2, h * w, 3, dtype=torch.float64)
    found = matcher(settings).token_map(x, h, w, 0.75, None).merge(x)
    cells = [
        [y * w + x for y in range(top, min(top + 2, h)) for x in range(left, min(left + 2, w))]
        for top in range(0, h, 2)
        for left in range(0, w, 2)
    ]
    expected = [x[:, cell].mean(1) if matcher.pools else x[:, cell[0]] for cell in cells]
    torch.testing.assert_close(found, torch.stack(expected, 1))
    assert matcher(settings).merged(0.75, h, w) == h * w - len(cells)


def test_a_late_candidate_is_the_librarys_own_schedule():
    pipe = sd_pipeline()
    pipe.scheduler = scheduler()
    pipe.set_progress_bar_config(disable=True)
    late = RatioSchedule.last(0.5, since=0.4)
    with Candidate("late", DiffusionSettings(ratio=late), LATE).patched(pipe):
        (found,) = sample(pipe, ["a cat"], [0], HOW)
    with patched(pipe, ratio=late):
        (expected,) = sample(pipe, ["a cat"], [0], HOW)
    (unpatched,) = sample(pipe, ["a cat"], [0], HOW)
    assert found.tobytes() == expected.tobytes() != unpatched.tobytes()


def test_a_schedules_mean_weighs_each_step():
    late = Candidate("late", DiffusionSettings(ratio=RatioSchedule.last(0.5, since=0.2)), LATE)
    assert late.over_steps(10.0, 5.0) == pytest.approx(0.2 * 10 + 0.8 * 5)
    always = Candidate("always", DiffusionSettings(ratio=0.5), "whole blocks")
    assert always.over_steps(10.0, 5.0) == 5.0
