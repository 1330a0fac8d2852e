"""The speed half of scripts/frontier.py: rounds of forwards of all candidates.

A candidate that merges in some of the steps is not timed: its time is the mean of those of the
unpatched model and of its steady candidate. A cache's cycle of steps is timed as a whole.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.files import read_json, write_json
from benchmarks.common.memory import first_line
from benchmarks.common.timing import interleave
from benchmarks.frontier.candidates import Candidate
from benchmarks.frontier.plan import Plan, merging, speed_dependencies
from benchmarks.models import unets
from benchmarks.models.unets import TIMESTEP
from benchmarks.peer.process import Peer, PeerError
from benchmarks.pictures.picture_set import UNPATCHED
from benchmarks.speed.forwards import timed_forward, timed_peer_forward
from benchmarks.speed.setup import Setup
from benchmarks.speed.variants import Variant
from tomesd.diffusion.ratio_schedule import all_ratios
from tomesd.diffusion.settings import DiffusionSettings


def measure_speed(plan: Plan) -> None:
    """Time all candidates, interleaved, until each has enough rounds; writes speed.json.

    >>> measure_speed(plan)

    The unpatched model is in every round, and ratios are taken within a round, so that rounds can
    be added later, also of new candidates. Each round is written when it is finished. Earlier
    rounds of a candidate with other settings are dropped.
    """
    setup, file = plan.large, plan.folder / "speed.json"
    record = _earlier_rounds(plan)
    rounds: list[dict[str, float]] = record["rounds"]

    def missing(candidate: Candidate) -> int:
        return setup.rounds - sum(candidate.name in times for times in rounds)

    timed = [each for each in plan.candidates if each.settings and each.steady is each]
    todo = [each for each in timed if missing(each) > 0]
    if not todo:
        return
    with ExitStack() as stack:
        runs = _warmed_up(setup, [plan.candidates[0], *todo], stack, record["errors"])
        todo = [each for each in todo if each.name in runs]
        write_json(file, record)
        with tqdm(total=sum(map(missing, todo)), desc="speed", unit="forward") as bar:
            while todo:
                names = [UNPATCHED, *(each.name for each in todo)]
                # The first one rotates, so that none always follows the same one.
                start = len(rounds) % len(names)
                times = interleave({n: runs[n] for n in names[start:] + names[:start]}, 1)
                rounds.append({name: times[name][0] for name in names})
                write_json(file, record)
                bar.update(len(todo))
                todo = [each for each in todo if missing(each) > 0]


def _earlier_rounds(plan: Plan) -> dict[str, Any]:
    """What speed.json has, without candidates whose settings have changed since."""
    own = merging(plan.candidates)
    record = {"depends_on": speed_dependencies(plan.large), "merging": own}
    earlier = read_json(plan.folder / "speed.json")
    if earlier is None:
        return record | {"errors": {}, "rounds": []}
    before = earlier["merging"]
    changed = {name for name, settings in own.items() if before.get(name, settings) != settings}
    rounds = [{n: t for n, t in times.items() if n not in changed} for times in earlier["rounds"]]
    errors = {name: text for name, text in earlier["errors"].items() if name not in own}
    return record | {"merging": before | own, "errors": errors, "rounds": rounds}


def _warmed_up(
    setup: Setup, candidates: Sequence[Candidate], stack: ExitStack, errors: dict[str, str]
) -> dict[str, Callable[[], float]]:
    """A function that times one forward of each; failures are recorded in `errors`."""
    unet = unets.build_unet(setup.denoiser.config, setup.device, setup.dtype)
    peer = setup.start_peer(stack) if any(each.is_peer for each in candidates) else None
    runs = {}
    for candidate in tqdm(candidates, desc="warm-up", unit="candidate"):
        try:
            runs[candidate.name] = _timed(setup, candidate, unet, peer, stack)
        except (PeerError, torch.OutOfMemoryError) as error:
            errors[candidate.name] = first_line(error)
            print(f"{candidate.name} cannot be timed: {error}", file=sys.stderr)
    return runs


def _timed(
    setup: Setup, candidate: Candidate, unet: Any, peer: Peer | None, stack: ExitStack
) -> Callable[[], float]:
    size = setup.sizes[0]
    if candidate.is_peer:
        assert peer is not None
        row: dict[str, Any] = {}
        variant = Variant(candidate.name, "peer", candidate.settings)
        run = timed_peer_forward(setup, peer, variant, size, row)
        if not row["blocks_merged"]:
            raise PeerError("it merged nothing")
        return run
    twin = unets.share_weights(unet)
    if candidate.cache is None:
        candidate.patch(twin).install()
        return timed_forward(setup, twin, size, {})
    scheduler = SimpleNamespace(timesteps=_Timesteps(candidate.timed_steps))
    steady = replace(candidate, settings=_largest(candidate.settings))
    stack.enter_context(steady.patched(SimpleNamespace(unet=twin, scheduler=scheduler)))
    one = timed_forward(setup, twin, size, {})
    return lambda: sum(one() for _ in range(candidate.cycle)) / candidate.cycle


def _largest(settings: DiffusionSettings | None) -> DiffusionSettings:
    """The settings of the steps that merge."""
    assert settings is not None
    return replace(settings, ratio=max(all_ratios(settings.ratio)))


@dataclass
class _Timesteps:
    """The timesteps of an image whose current step is one further each time they are read, and
    always at the same timestep."""

    count: int
    step: int = -1

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.step += 1
        return chain(repeat(-1, self.step), [TIMESTEP])
