"""The quality half of scripts/frontier.py: each candidate's pictures, compared."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from benchmarks.common.files import read_json, write_json
from benchmarks.fid.distances import distances
from benchmarks.fid.plan import cache_name
from benchmarks.frontier.candidates import Candidate
from benchmarks.frontier.plan import FEATURES, Plan, merging, quality_dependencies
from benchmarks.peer.process import Peer, PeerPipeline
from benchmarks.pictures.differences import differences
from benchmarks.pictures.picture_set import make_pictures
from benchmarks.pictures.reference import Pictures


def measure_quality(plan: Plan) -> None:
    """Make the missing pictures and compare all of them; writes quality.json.

    >>> measure_quality(plan)

    Results of other candidates in quality.json are kept.
    Raises FloatingPointError for a picture that overflowed, PeerError where the peer fails, and
    OSError where writing does; finished work is kept.
    """
    plan.pictures.remove_partial_files()
    state = PartialState(cpu=plan.small.device.type == "cpu")
    ours = [candidate for candidate in plan.candidates if not candidate.is_peer]
    make_pictures(plan.spec.load(), replace(plan.pictures, methods=[*ours]), state)
    with ExitStack() as stack:
        start = _peer_starter(plan, stack)
        for candidate in plan.candidates:
            if candidate.is_peer:
                assert candidate.settings is not None
                settings = plan.small.peer_settings(candidate.settings)
                pipe = PeerPipeline(start, settings, plan.spec.dtype)
                make_pictures(pipe, replace(plan.pictures, methods=[candidate]), state)
    rows = {each.name: compare(plan, each) for each in tqdm(plan.candidates, desc="distances")}
    file = plan.folder / "quality.json"
    earlier = read_json(file) or {"merging": {}, "rows": {}}
    record = {
        "depends_on": quality_dependencies(plan.metadata, plan.small.device, plan.reference.name),
        "merging": earlier["merging"] | merging(plan.candidates),
        "rows": earlier["rows"] | rows,
    }
    write_json(file, record)


def _peer_starter(plan: Plan, stack: ExitStack) -> Callable[[], Peer]:
    """A function that starts the peer with its pipeline when it is first called."""

    @cache
    def start() -> Peer:
        assert plan.small.peer is not None
        peer = stack.enter_context(Peer(plan.small.peer))
        dtype = str(plan.spec.dtype).removeprefix("torch.")
        folder = str(plan.pipeline)
        peer.ask("load_pipeline", folder=folder, device=plan.spec.device, dtype=dtype)
        return peer

    return start


def compare(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    """A candidate's pictures compared with drawn ones, and seed by seed with the unpatched ones."""
    width, height = plan.pictures.sampling.width, plan.pictures.sampling.height
    assert width is not None
    assert height is not None
    device = plan.small.device
    paths = plan.pictures.paths(candidate)
    figures: dict[str, Any] = distances(
        Pictures(paths, (width, height)),
        plan.reference.of_size((width, height)),
        FEATURES,
        plan.folder / "reference",
        cache_name(plan.reference, (width, height), FEATURES),
        device,
    )
    if candidate.settings is None:
        return figures
    unpatched = plan.pictures.paths(plan.candidates[0])
    return figures | differences(paths, unpatched, None, device)
