"""Time of the patch's own steps: matching, merging and unmerging at each level of a denoiser."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.timing import Spread, interleave, merging_seconds, round_ratio
from benchmarks.models.unets import Level, noise
from benchmarks.peer.process import Peer
from benchmarks.speed.setup import Setup, record_failure
from tomesd.core.partition import make_key
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.settings import DiffusionSettings

STEPS = ("match", "merge", "unmerge")


def measure_cost(setup: Setup) -> Iterator[list[dict]]:
    """The rows of each size, one for each level and variant.

    >>> rows = [row for rows in measure_cost(setup) for row in rows]
    """
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(setup.peer)) if setup.peer else None
        for size in setup.sizes:
            levels = setup.denoiser.levels(setup.latents(size))
            yield [row for level in levels for row in measure_level(setup, size, level, peer)]


def measure_level(setup: Setup, size: int, level: Level, peer: Peer | None) -> list[dict]:
    """The rows of one level, timed in interleaved rounds; a variant that fails has no times."""
    tokens = level.h * level.w
    x = noise((setup.batch, tokens, level.channels), setup.device, setup.dtype)
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    rows = {}
    for variant in setup.variants:
        settings = variant.settings
        assert settings is not None
        if variant.kind == "peer":
            assert peer is not None
            runs[variant.name] = _peer_steps(setup, peer, settings, level)
        else:
            runs[variant.name] = partial(own_steps, settings, x, level)
        rows[variant.name] = {
            "size": size,
            **asdict(level),
            "batch": setup.batch,
            "variant": variant.name,
            "kind": variant.kind,
            "patch": asdict(settings),
        }
        with record_failure(rows[variant.name]):
            runs[variant.name]()
    runs = {name: run for name, run in runs.items() if "error" not in rows[name]}
    description = f"{tokens} × {level.channels}"
    with tqdm(total=setup.rounds * len(runs), desc=description, unit="run") as bar:
        times = interleave(runs, setup.rounds, bar.update)
    _summarize(setup, rows, times)
    return list(rows.values())


def _summarize(
    setup: Setup, rows: dict[str, dict], times: dict[str, list[dict[str, float]]]
) -> None:
    totals = {name: [sum(steps.values()) for steps in times[name]] for name in times}
    for name, own in times.items():
        row = rows[name]
        row["seconds"] = own
        for step in STEPS:
            row[step] = asdict(Spread.of([steps[step] for steps in own]))
        row["all"] = asdict(Spread.of(totals[name]))
        peer = f"{setup.peer_name} {row['patch']['ratio']:g}"
        if row["kind"] == "patched" and peer in totals:
            row["share_of_peer"] = asdict(round_ratio(totals[name], totals[peer]))


def _peer_steps(
    setup: Setup, peer: Peer, settings: DiffusionSettings, level: Level
) -> Callable[[], dict[str, float]]:
    return partial(
        peer.ask,
        "merging",
        batch=setup.batch,
        h=level.h,
        w=level.w,
        channels=level.channels,
        settings=setup.peer_settings(settings),
        device=str(setup.device),
        dtype=str(setup.dtype).removeprefix("torch."),
    )


def own_steps(settings: DiffusionSettings, x: Tensor, level: Level) -> dict[str, float]:
    """Seconds of this project's matching, merging and unmerging of tokens x at a level."""

    matcher, ratio = Matcher(settings), settings.ratio
    assert isinstance(ratio, float)

    def match():
        key = make_key(settings.seed, 500).to(x.device) if matcher.is_random else None
        token_map = matcher.token_map(x, level.h, level.w, ratio, key)
        return partial(token_map.merge, how=matcher.combine), token_map.unmerge

    with torch.no_grad():
        return merging_seconds(match, x)
