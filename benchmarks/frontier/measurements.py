"""What `scripts/frontier.py` does: how good each candidate's pictures are, and how fast it is.

The halves are measured apart, each keeps what it found in a file of its own, and `results` joins
them. Quality is that of a small pipeline's pictures; speed is that of a full-size denoiser. What
merges in some of the steps is not timed by itself: its time is the mean of steps with and without.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.common.files import versions, atomic_write
from benchmarks.common.timing import Spread, interleave, round_ratio
from benchmarks.fid.measurements import device_name, digest
from benchmarks.fid.distances import Features, distances
from benchmarks.frontier.candidates import CANDIDATES, Candidate
from benchmarks.frontier.matchers import install
from benchmarks.pictures.differences import changes
from benchmarks.pictures.reference import Pictures, Reference
from benchmarks.pictures.picture_set import UNPATCHED, Model, Run, make
from benchmarks.speed import full_size
from benchmarks.speed.forwards import Setup, environment, our_run, peer_run, start_peer
from benchmarks.peer.process import Peer, PeerError, PeerPipeline
from benchmarks.speed.variants import Variant
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.patch import UNetPatch

FEATURES = Features("shapes")


@dataclass(frozen=True)
class Plan:
    """All that both halves need, checked.

    pipeline: the folder of what makes the run's pictures. small: its denoiser; large: the one that
    is timed. told: what the pictures depend on.
    """

    folder: Path
    candidates: list[Candidate]
    run: Run
    model: Model
    pipeline: Path
    reference: Reference
    told: Mapping[str, Any]
    small: Setup
    large: Setup

    @property
    def peers(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.is_peer]


def about_quality(told: Mapping[str, Any], device: torch.device, reference: str) -> dict[str, Any]:
    """All that quality.json's figures depend on but the candidates, as JSON gives it back."""
    about = {
        **told,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        **versions("torch-fidelity", "scikit-image"),
        "reference": reference,
    }
    return json.loads(json.dumps(about))


def about_speed(setup: Setup) -> dict[str, Any]:
    """All that speed.json's times depend on but the candidates, as JSON gives it back."""
    about = {"model": setup.denoiser.name, "size": setup.sizes[0], **environment(setup)}
    del about["rounds"], about["peer"]
    return json.loads(json.dumps(about))


def check_held(file: Path, about: Mapping[str, Any]) -> None:
    """Raises ValueError if the file holds figures that others cannot stand beside.

    >>> check_held(folder / "speed.json", about_speed(setup))
    """
    held = _read(file)
    if held is None or held["about"] == about:
        return
    names = [*about, *(name for name in held["about"] if name not in about)]
    differ = [
        f"{name}={held['about'].get(name)!r} there, {about.get(name)!r} now"
        for name in names
        if held["about"].get(name) != about.get(name)
    ]
    raise ValueError(
        f"output must be another folder, or {file} deleted: its figures are from "
        f"{'; '.join(differ)}"
    )


def measure_quality(plan: Plan) -> None:
    """Make the pictures that are not there yet, then compare them all; writes quality.json.

    What quality.json holds of other candidates stays: `check_held` has seen that they can stand
    side by side.

    Raises FloatingPointError for a picture that overflowed, PeerError where the peer fails, and
    OSError where writing does; what is there stays.
    """
    for partial_file in plan.run.folder.glob("*/.*.partial"):  # of a run that was killed
        partial_file.unlink(missing_ok=True)
    state = PartialState(cpu=plan.small.device.type == "cpu")
    ours = [candidate for candidate in plan.candidates if not candidate.is_peer]
    make(plan.model.load(), replace(plan.run, rows=[*ours]), state)
    with ExitStack() as stack:
        start = cache(partial(_start_peer, plan, stack))
        for candidate in plan.peers:
            assert candidate.settings is not None
            settings = plan.small.peer_settings(candidate.settings)
            pipe = PeerPipeline(start, settings, plan.model.dtype)
            make(pipe, replace(plan.run, rows=[candidate]), state)
    rows = {each.name: compare(plan, each) for each in tqdm(plan.candidates, desc="distances")}
    file, merging = plan.folder / "quality.json", _merging(plan.candidates)
    held = _read(file) or {"merging": {}, "rows": {}}
    record = {
        "about": about_quality(plan.told, plan.small.device, plan.reference.name),
        "merging": held["merging"] | merging,
        "rows": held["rows"] | rows,
    }
    _write(file, record)


def _start_peer(plan: Plan, stack: ExitStack) -> Peer:
    assert plan.small.peer is not None
    peer = stack.enter_context(Peer(plan.small.peer))
    dtype = str(plan.model.dtype).removeprefix("torch.")
    peer.ask("load_pipeline", folder=str(plan.pipeline), device=plan.model.device, dtype=dtype)
    return peer


def compare(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    """A candidate's pictures against drawn ones and, seed by seed, the unpatched pipeline's."""
    width, height = plan.run.sampling.width, plan.run.sampling.height
    assert width is not None
    assert height is not None
    device = plan.small.device
    figures: dict[str, Any] = distances(
        Pictures(plan.run.paths(candidate), (width, height)),
        plan.reference.of_size((width, height)),
        FEATURES,
        plan.folder / "reference",
        f"{plan.reference.name}-{width}x{height}-{digest(FEATURES.source)}",
        device,
    )
    if candidate.settings is None:
        return figures
    unpatched = plan.run.paths(plan.candidates[0])
    return figures | changes(plan.run.paths(candidate), unpatched, None, device)


def measure_speed(plan: Plan) -> None:
    """Time all candidates in turns, until each has been in so many rounds; writes speed.json.

    The unpatched model is in every round, and ratios are taken within a round: so rounds can be
    added later, for candidates that were not there before too. Each round is kept once it is done.
    Those of a candidate with other settings are dropped; `check_held` has seen that the rest fits.
    """
    setup, file = plan.large, plan.folder / "speed.json"
    about = about_speed(setup)
    merging, held = _merging(plan.candidates), _read(file)
    rounds: list[dict[str, float]] = []
    errors: dict[str, str] = {}
    if held:
        before = held["merging"]
        gone = {
            name for name, settings in merging.items() if before.get(name, settings) != settings
        }
        rounds = [{n: t for n, t in taken.items() if n not in gone} for taken in held["rounds"]]
        errors = {name: text for name, text in held["errors"].items() if name not in merging}
        merging = before | merging

    def missing(candidate: Candidate) -> int:
        return setup.rounds - sum(candidate.name in taken for taken in rounds)

    timed = [each for each in plan.candidates if each.settings and each.timed == each.name]
    todo = [each for each in timed if missing(each) > 0]
    if not todo:
        return
    with ExitStack() as stack:
        runs = _runs(setup, [plan.candidates[0], *todo], stack, errors)
        todo = [each for each in todo if each.name in runs]
        record = {"about": about, "merging": merging, "errors": errors, "rounds": rounds}
        _write(file, record)
        with tqdm(total=sum(map(missing, todo)), desc="speed", unit="forward") as bar:
            while todo:
                names = [UNPATCHED, *(each.name for each in todo)]
                # Who begins changes from round to round, so that none always follows the same one.
                start = len(rounds) % len(names)
                turns = {name: runs[name] for name in names[start:] + names[:start]}
                taken = interleave(turns, 1)
                rounds.append({name: taken[name][0] for name in names})
                _write(file, record)
                bar.update(len(todo))
                todo = [each for each in todo if missing(each) > 0]


def _runs(
    setup: Setup, candidates: Sequence[Candidate], stack: ExitStack, errors: dict[str, str]
) -> dict[str, Callable[[], float]]:
    """What times one forward of each, warmed up; one that fails is noted among the errors."""
    config = setup.denoiser.config
    unet = full_size.build_unet(config, setup.device, setup.dtype)
    peer = start_peer(setup, stack) if any(each.is_peer for each in candidates) else None
    runs = {}
    for candidate in tqdm(candidates, desc="warming up", unit="candidate"):
        try:
            runs[candidate.name] = _run(setup, candidate, unet, peer)
        except (PeerError, torch.OutOfMemoryError) as error:
            errors[candidate.name] = str(error).splitlines()[0]
            print(f"{candidate.name} cannot be timed: {error}", file=sys.stderr)
    return runs


def _run(setup: Setup, candidate: Candidate, unet: Any, peer: Peer | None) -> Callable[[], float]:
    size = setup.sizes[0]
    if candidate.is_peer:
        assert peer is not None
        row: dict[str, Any] = {}
        variant = Variant(candidate.name, "peer", candidate.settings)
        run = peer_run(setup, peer, variant, size, row)
        if not row["blocks_merged"]:
            raise PeerError("it merged nothing")
        return run
    twin = full_size.share_weights(unet)
    if candidate.settings is not None:
        install(twin, candidate.settings)
    return partial(_mean, our_run(setup, twin, size, {}), candidate.period)


def _mean(run: Callable[[], float], times: int) -> float:
    return fmean(run() for _ in range(times))


def results(plan: Plan) -> dict[str, Any]:
    """Everything that the folder holds of the candidates, with what it depends on.

    A row for each candidate that was measured by one half at least, with its settings of today.
    """
    quality, speed = (_read(plan.folder / f"{half}.json") for half in ("quality", "speed"))
    left = {"small": work_left(plan.small, CANDIDATES), "large": work_left(plan.large, CANDIDATES)}
    rows = []
    for candidate in CANDIDATES:
        name, settings = candidate.name, candidate.settings
        row: dict[str, Any] = {
            "name": name,
            "family": candidate.family,
            "is_setting": candidate.is_setting,
            "shipped_as": candidate.shipped_as,
            "settings": asdict(settings) if settings else None,
            "attention_left": {size: shares[name] for size, shares in left.items()},
        }
        found = _of(quality, candidate)["rows"].get(name, {}) if quality else {}
        if speed:
            timed = next(each for each in CANDIDATES if each.name == candidate.timed)
            found = found | _speed(_of(speed, timed), candidate)
        if found:
            rows.append(row | found)
    return {
        "quality": quality and quality["about"],
        "speed": speed and speed["about"] | {"rounds": plan.large.rounds},
        "rows": mark(rows),
    }


def _of(half: dict[str, Any], candidate: Candidate) -> dict[str, Any]:
    """The half without what was measured of a candidate of this name with other settings."""
    if half["merging"].get(candidate.name) == _merging([candidate])[candidate.name]:
        return half
    return half | {"rows": {}, "rounds": [], "errors": {}}


def _speed(speed: dict[str, Any], candidate: Candidate) -> dict[str, Any]:
    name = candidate.timed
    rounds = [taken for taken in speed["rounds"] if name in taken]
    if not rounds:
        return {"error": speed["errors"][name]} if name in speed["errors"] else {}
    base = [taken[UNPATCHED] for taken in rounds]
    own = [candidate.over_steps(taken[UNPATCHED], taken[name]) for taken in rounds]
    return {"seconds": asdict(Spread.of(own)), "speedup": asdict(round_ratio(base, own))}


def work_left(setup: Setup, candidates: Sequence[Candidate]) -> dict[str, float]:
    """By name, the share of self-attention's query–key pairs that is still computed.

    Over all blocks of the denoiser, from shapes alone.
    """
    config = setup.denoiser.config | {"sample_size": setup.latents(setup.sizes[0])}
    unet = full_size.empty_unet(config)
    shares = {}
    for candidate in candidates:
        rows = UNetPatch(unet, candidate.settings or DiffusionSettings(ratio=0)).rows()
        work = sum(row.blocks * row.tokens**2 for row in rows)
        left = sum(row.blocks * row.tokens**2 * row.work for row in rows)
        shares[candidate.name] = candidate.over_steps(1.0, left / work)
    return shares


def mark(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each row by which measures of quality it is on the frontier: no other one is both as
    good and as fast, and better in one of them.

    "frontier" is among all rows and "settings_frontier" among those that `apply_patch` can do,
    alike in every step.
    """
    for row in rows:
        row["frontier"], row["settings_frontier"] = [], []
    for measure, sign in (("psnr", 1), ("frechet", -1)):
        there = [row for row in rows if row.get(measure) is not None and row.get("speedup")]
        usual = [row for row in there if row["is_setting"] or row["settings"] is None]
        for key, among in (("frontier", there), ("settings_frontier", usual)):
            points = [(row["speedup"]["median"], sign * row[measure]) for row in among]
            for index in frontier(points):
                among[index][key].append(measure)
    return rows


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats, where more is better in both numbers; fastest last.

    >>> frontier([(1.0, 3.0), (2.0, 2.0), (1.5, 1.0)])
    [0, 1]
    """
    best = [
        index
        for index, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(best, key=lambda index: points[index])


def _merging(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """What each candidate does, by name, as JSON gives it back."""
    return {
        each.name: [type(each.settings).__name__, each.family, asdict(each.settings)]
        if each.settings
        else None
        for each in candidates
    }


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def _write(file: Path, record: dict[str, Any]) -> None:
    with atomic_write(file) as partial_file:
        partial_file.write_text(json.dumps(record, indent=1) + "\n")
