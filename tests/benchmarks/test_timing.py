"""Times are compared within a round, and memory is counted where it is used."""

import gc
import math
import os
import time

import pytest
import torch

from benchmarks.common.memory import in_child, peak_memory, peak_resident, resident
from benchmarks.common.timing import (
    Spread,
    interleave,
    merging_seconds,
    round_ratio,
    seconds,
    share_of_ideal,
)

CPU = torch.device("cpu")


def test_all_variants_take_turns_and_none_always_starts():
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


def test_the_share_of_the_ideal_is_the_part_of_its_saving_that_is_reached():
    share = share_of_ideal([4.0, 8.0], [3.0, 6.0], [2.0, 4.0])
    assert share == Spread(0.5, 0.5, 0.5)


def test_where_the_ideal_saves_nothing_there_is_no_share_of_it():
    assert share_of_ideal([4.0, 4.0], [3.0, 3.0], [2.0, 4.0]) is None


def test_seconds_cover_the_whole_call():
    assert seconds(lambda: time.sleep(0.02), CPU) >= 0.02


def test_the_three_steps_of_merging_are_timed_apart_after_a_run_that_does_not_count():
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
    # The merged tokens, not the whole ones, are what is unmerged.
    warm_up = ["match", "merge", "unmerge 2", "merge"]
    assert calls == [*warm_up, "match", "merge", "unmerge 2"]


def test_a_child_does_its_work_in_another_process_and_hands_back_the_result():
    assert in_child(os.getppid) == os.getpid()


def test_a_childs_peak_does_not_count_what_its_parent_holds():
    held = torch.ones(800 * 2**20, dtype=torch.uint8)
    assert peak_resident() > held.numel()
    assert in_child(peak_resident) < held.numel()


def test_an_error_in_a_child_is_raised_here_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"sqrt failed(.|\n)*ValueError"):
        in_child(math.sqrt, -1.0)


def test_a_child_in_which_torch_finds_no_memory_is_reported_as_out_of_memory():
    with pytest.raises(MemoryError, match=r"empty failed in its process: .*can't allocate memory"):
        in_child(torch.empty, 2**50)


def test_a_child_that_is_killed_is_reported_as_out_of_memory():
    with pytest.raises(MemoryError, match=r"exit code 137"):
        in_child(os._exit, 137)


def test_the_peak_is_that_of_the_work_and_not_of_what_came_before():
    earlier = torch.ones(300 * 2**20, dtype=torch.uint8)
    del earlier
    peak = peak_memory(lambda: torch.ones(2**20, dtype=torch.uint8), CPU)
    assert peak_resident() - resident() < 200 * 2**20
    assert peak.peak - peak.before < 100 * 2**20


def test_where_the_earlier_peak_stays_it_is_said(monkeypatch):
    def refuse(path, text):
        raise PermissionError(f"{path}: not allowed")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.warns(UserWarning, match=r"includes what came before.*clear_refs: not allowed"):
        peak_memory(int, CPU)


def test_the_peak_counts_memory_that_is_freed_before_the_end():
    # The system counts pages in batches for each core, and other memory of this process may be
    # freed meanwhile: a quarter is more than that.
    count = 256 * 2**20
    gc.collect()
    peak = peak_memory(lambda: torch.ones(count, dtype=torch.uint8), CPU)
    assert peak.peak - peak.before >= 0.75 * count


def test_the_peak_is_refused_on_devices_that_count_none():
    with pytest.raises(ValueError, match="device must be cuda or cpu, got meta"):
        peak_memory(int, torch.device("meta"))
