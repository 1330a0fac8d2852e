"""Times are compared within a round, and peak memory is that of the work."""

import math
import os
import time

import pytest
import torch

from benchmarks.common import memory
from benchmarks.common.memory import Peak, in_child, peak_memory, peak_resident, resident
from benchmarks.common.timing import (
    Spread,
    interleave,
    merging_seconds,
    round_ratio,
    seconds,
    share_of_ideal,
)
from tests.support.slow import slow

CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_the_first_run_rotates():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = interleave(runs, rounds=4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_progress_ticks_once_for_every_run():
    ticks = []
    interleave({"a": int, "b": int}, rounds=3, tick=lambda: ticks.append(1))
    assert len(ticks) == 6


def test_fewer_than_one_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        interleave({"a": int}, rounds=0)


def test_a_machine_that_slows_down_does_not_change_a_ratio():
    drift = [1.0, 2.0, 5.0, 3.0]
    assert round_ratio([3 * d for d in drift], [2 * d for d in drift]) == Spread(1.5, 1.5, 1.5)


def test_a_spread_is_the_median_and_the_quartiles():
    values = torch.randn(101, generator=torch.Generator().manual_seed(0)).double()
    expected = values.quantile(torch.tensor([0.5, 0.25, 0.75]).double()).tolist()
    spread = Spread.of(values.tolist())
    assert [spread.median, spread.low, spread.high] == pytest.approx(expected)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="values"):
        Spread.of([])


def test_the_share_of_the_ideal_is_relative_to_its_saving():
    share = share_of_ideal([4.0, 8.0], [3.0, 6.0], [2.0, 4.0])
    assert share == Spread(0.5, 0.5, 0.5)


def test_an_ideal_that_saves_nothing_has_no_share():
    assert share_of_ideal([4.0, 4.0], [3.0, 3.0], [2.0, 4.0]) is None


def test_seconds_cover_the_whole_call():
    assert seconds(lambda: time.sleep(0.02), CPU) >= 0.02


def test_the_three_steps_of_merging_are_timed_separately_after_a_warm_up():
    calls = []

    def match():
        calls.append("match")
        return (
            lambda x: calls.append("merge") or x[:, :2],
            lambda y: calls.append(f"unmerge {y.shape[1]}") or y,
        )

    times = merging_seconds(match, torch.ones(1, 4, 3))
    assert times.keys() == {"match", "merge", "unmerge"}
    assert min(times.values()) > 0
    # The merged tokens are unmerged.
    warm_up = ["match", "merge", "unmerge 2", "merge"]
    assert calls == [*warm_up, "match", "merge", "unmerge 2"]


def test_a_child_runs_in_another_process_and_returns_the_result():
    assert in_child(os.getppid) == os.getpid()


@slow
def test_a_childs_peak_does_not_count_what_its_parent_holds():
    held = torch.ones(800 * 2**20, dtype=torch.uint8)
    assert peak_resident() > held.numel()
    assert in_child(peak_resident) < held.numel()


def test_an_error_in_a_child_is_raised_here_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"sqrt failed(.|\n)*ValueError"):
        in_child(math.sqrt, -1.0)


def test_a_child_in_which_torch_runs_out_of_memory_raises_memory_error():
    with pytest.raises(MemoryError, match=r"empty failed in its process: .*can't allocate memory"):
        in_child(torch.empty, 2**50)


def test_a_child_that_is_killed_raises_memory_error():
    with pytest.raises(MemoryError, match=r"exit code 137"):
        in_child(os._exit, 137)


def test_the_peak_is_reset_before_the_work_and_read_after_it(monkeypatch):
    # Real resident memory depends on what else the machine does.
    calls = []

    def status(field):
        calls.append(field)
        return {"VmRSS": 100, "VmHWM": 175}[field]

    monkeypatch.setattr(memory, "_reset_peak", lambda: calls.append("reset"))
    monkeypatch.setattr(memory, "_status", status)
    assert peak_memory(lambda: calls.append("work"), CPU) == Peak(before=100, peak=175)
    assert calls == ["reset", "VmRSS", "work", "VmHWM"]


def test_the_peak_is_at_least_the_memory_held_now():
    assert 0 < resident() <= peak_resident()


def test_an_earlier_peak_that_cannot_be_reset_is_a_warning(monkeypatch):
    def refuse(path, text):
        raise PermissionError(f"{path}: not allowed")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.warns(UserWarning, match=r"includes earlier work.*clear_refs: not allowed"):
        peak_memory(int, CPU)


def test_the_peak_is_refused_on_devices_that_count_none():
    with pytest.raises(ValueError, match="device must be cuda or cpu, got meta"):
        peak_memory(int, torch.device("meta"))
