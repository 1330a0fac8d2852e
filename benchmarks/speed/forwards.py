"""Time and memory of one forward of each variant of a denoiser."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from tqdm import tqdm

from benchmarks.common.memory import Peak, in_child, peak_memory
from benchmarks.common.timing import Spread, interleave, round_ratio, seconds, share_of_ideal
from benchmarks.models.unets import share_weights
from benchmarks.peer.process import Peer, PeerError
from benchmarks.speed.setup import Setup, new_row, record_failure
from benchmarks.speed.variants import Variant, forward, prepare


def measure_forwards(setup: Setup) -> Iterator[list[dict]]:
    """The rows of each size, one for each variant.

    >>> rows = [row for rows in measure_forwards(setup) for row in rows]

    Memory of all sizes is measured first, while no other model is loaded; a row for which memory
    ran out is not timed.
    """
    rows = {size: [new_row(variant, size) for variant in setup.variants] for size in setup.sizes}
    if setup.measures_memory and setup.device.type == "cpu":
        tasks = [(size, *task) for size in rows for task in enumerate(setup.variants)]
        for size, index, variant in tqdm(tasks, desc="memory", unit="process"):
            with record_failure(rows[size][index]):
                rows[size][index]["memory"] = child_peak(setup, variant, size)
        if all("error" in row for same in rows.values() for row in same):
            yield from rows.values()
            return
    model = setup.denoiser.build(setup.device, setup.dtype)
    with ExitStack() as stack:
        peer = setup.start_peer(stack)
        twins = {
            variant.name: prepare(share_weights(model), variant)
            for variant in setup.variants
            if variant.kind != "peer"
        }
        for same in rows.values():
            measure_size(setup, same, twins, peer)
            yield same


def measure_memory(setup: Setup) -> Iterator[list[dict]]:
    """The rows of each size, one for each variant: memory alone, each in a process of its own.

    >>> rows = [row for rows in measure_memory(setup) for row in rows]
    """
    for size in setup.sizes:
        rows = []
        for variant in tqdm(setup.variants, desc=f"{size} px, memory", unit="process"):
            rows.append(new_row(variant, size))
            with record_failure(rows[-1]):
                rows[-1]["memory"] = child_peak(setup, variant, size)
        yield rows


def child_peak(setup: Setup, variant: Variant, size: int) -> dict[str, int] | None:
    """Memory of one forward in a process of its own; None if the peer fails."""
    if variant.kind != "peer":
        return in_child(forward_peak, setup, variant, size)._asdict()
    with ExitStack() as stack:
        try:
            peer = setup.start_peer(stack)
            assert peer is not None
            setup.patch_peer(peer, variant)
            request = {"batch": setup.batch, "size": setup.latents(size)}
            before, peak = peer.ask("peak", variant=variant.name, **request)
        except PeerError:
            return None
    return {"before": before, "peak": peak}


def forward_peak(setup: Setup, variant: Variant, size: int) -> Peak:
    """Memory of one forward; on the CPU, call it in a fresh process (`memory.in_child`).

    >>> peak = in_child(forward_peak, setup, Variant("unpatched", "unpatched"), 512)
    """
    model = prepare(setup.denoiser.build(setup.device, setup.dtype), variant)
    call = forward(model, setup.inputs(size), setup.compiled)
    if setup.device.type == "cuda":  # The first call allocates what later ones reuse.
        call()
    return peak_memory(call, setup.device)


def measure_size(setup: Setup, rows: list[dict], twins: dict[str, Any], peer: Peer | None) -> None:
    """Time all rows of a size that did not fail, interleaved, and add the results to them."""
    runs: dict[str, Callable[[], float]] = {}
    size = rows[0]["size"]
    tasks = list(zip(setup.variants, rows, strict=True))
    for variant, row in tqdm(tasks, desc=f"{size} px, warm-up", unit="forward"):
        if "error" in row:
            continue
        with record_failure(row):
            if variant.kind == "peer":
                assert peer is not None
                runs[variant.name] = timed_peer_forward(setup, peer, variant, size, row)
            else:
                runs[variant.name] = timed_forward(setup, twins[variant.name], size, row)
    with tqdm(total=setup.rounds * len(runs), desc=f"{size} px", unit="forward") as bar:
        times = interleave(runs, setup.rounds, bar.update)
    summarize({row["variant"]: row for row in rows}, times)


def timed_forward(setup: Setup, model: Any, size: int, row: dict) -> Callable[[], float]:
    """A function that times one forward, after the warm-up; on CUDA, memory is added to the row."""
    call = forward(model, setup.inputs(size), setup.compiled)
    for _ in range(setup.warm_ups):
        call()
    if setup.measures_memory and setup.device.type == "cuda":
        row["memory"] = peak_memory(call, setup.device)._asdict()
    return partial(seconds, call, setup.device)


def timed_peer_forward(
    setup: Setup, peer: Peer, variant: Variant, size: int, row: dict
) -> Callable[[], float]:
    """The same in the peer's process; the number of blocks that merge is added to the row too."""
    request = {"variant": variant.name, "batch": setup.batch, "size": setup.latents(size)}
    row["patch"] = setup.patch_peer(peer, variant)
    row["blocks_merged"] = peer.ask("matches", **request)
    for _ in range(setup.warm_ups):
        peer.ask("forward", **request)
    if setup.measures_memory and setup.device.type == "cuda":
        before, peak = peer.ask("peak", **request)
        row["memory"] = {"before": before, "peak": peak}
    return partial(peer.ask, "forward", **request)


def summarize(rows: dict[str, dict], times: dict[str, list[float]]) -> None:
    """Add medians, speedup and share of the ideal's saving to each timed row."""
    ideals = {row["patch"]["ratio"]: name for name, row in rows.items() if row["kind"] == "ideal"}
    base = times.get("unpatched")
    for name, own in times.items():
        row = rows[name]
        row["seconds"] = own
        row["median_seconds"] = asdict(Spread.of(own))
        row["speedup"] = asdict(round_ratio(base, own)) if base else None
        ideal = times.get(ideals.get(row["patch"]["ratio"], "")) if row["patch"] else None
        share = share_of_ideal(base, own, ideal) if base and ideal else None
        row["share_of_ideal"] = asdict(share) if share else None
