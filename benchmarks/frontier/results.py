"""The results of scripts/frontier.py: both halves joined, and which candidates no other beats."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.common.files import read_json
from benchmarks.common.timing import Spread, round_ratio
from benchmarks.frontier.candidates import CANDIDATES, Candidate
from benchmarks.frontier.plan import Plan, merging
from benchmarks.models import unets
from benchmarks.pictures.picture_set import UNPATCHED, as_record
from benchmarks.speed.setup import Setup


def joined_results(plan: Plan) -> dict[str, Any]:
    """Everything that the folder has of the candidates, with what it depends on.

    >>> joined_results(plan)["rows"][0]["name"]
    'unpatched'

    A row for each candidate with results of at least one half, of its current settings.
    """
    quality, speed = (read_json(plan.folder / f"{half}.json") for half in ("quality", "speed"))
    left = {"small": work_left(plan.small, CANDIDATES), "large": work_left(plan.large, CANDIDATES)}
    rows = []
    for candidate in CANDIDATES:
        row: dict[str, Any] = {
            "name": candidate.name,
            "family": candidate.family,
            "is_setting": candidate.is_steady_setting,
            "shipped_as": candidate.shipped_as,
            "settings": as_record(candidate.settings) if candidate.settings else None,
            "attention_left": {size: shares.get(candidate.name) for size, shares in left.items()},
        }
        found: dict[str, Any] = {}
        if quality and _is_current(quality, candidate):
            found |= quality["rows"].get(candidate.name, {})
        if speed and _is_current(speed, candidate.steady):
            found |= _speed(speed, candidate)
        if found:
            rows.append(row | found)
    return {
        "quality": quality and quality["depends_on"],
        "speed": speed and speed["depends_on"] | {"rounds": plan.large.rounds},
        "rows": mark_frontiers(rows),
    }


def _is_current(half: Mapping[str, Any], candidate: Candidate) -> bool:
    """Whether the half measured a candidate with its current settings."""
    return half["merging"].get(candidate.name) == merging([candidate])[candidate.name]


def _speed(speed: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    name = candidate.steady.name
    rounds = [times for times in speed["rounds"] if name in times]
    if not rounds:
        return {"error": speed["errors"][name]} if name in speed["errors"] else {}
    base = [times[UNPATCHED] for times in rounds]
    own = [candidate.over_steps(times[UNPATCHED], times[name]) for times in rounds]
    return {"seconds": asdict(Spread.of(own)), "speedup": asdict(round_ratio(base, own))}


def work_left(setup: Setup, candidates: Sequence[Candidate]) -> dict[str, float]:
    """The share of self-attention's query–key pairs that is still computed, by name.

    >>> work_left(setup, chosen(["blocks 0.5"], with_peer=False))["unpatched"]
    1.0

    Over all blocks of the denoiser, from shapes alone; caches are left out.
    """
    config = setup.denoiser.config | {"sample_size": setup.latents(setup.sizes[0])}
    unet = unets.empty_unet(config)
    shares = {}
    for candidate in candidates:
        if candidate.cache is not None:
            continue
        rows = candidate.steady.patch(unet).rows()
        work = sum(row.blocks * row.tokens**2 for row in rows)
        left = sum(row.blocks * row.tokens**2 * row.work for row in rows)
        shares[candidate.name] = candidate.over_steps(1.0, left / work)
    return shares


def mark_frontiers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row the measures of quality by which it is on a frontier: no other row is both as
    good and as fast, and better in one of them.

    >>> mark_frontiers(rows)[0]["frontier"]
    ['psnr', 'frechet']

    "frontier" is among all rows and "settings_frontier" among those that `apply_patch` supports
    with the same ratio in every step.
    """
    for row in rows:
        row["frontier"], row["settings_frontier"] = [], []
    for measure, sign in (("psnr", 1), ("frechet", -1)):
        complete = [row for row in rows if row.get(measure) is not None and row.get("speedup")]
        steady = [row for row in complete if row["is_setting"] or row["settings"] is None]
        for key, among in (("frontier", complete), ("settings_frontier", steady)):
            points = [(row["speedup"]["median"], sign * row[measure]) for row in among]
            for index in pareto_front(points):
                among[index][key].append(measure)
    return rows


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other one beats, where more is better; fastest last.

    >>> pareto_front([(1.0, 3.0), (2.0, 2.0), (1.5, 1.0)])
    [0, 1]
    """
    best = [
        index
        for index, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(best, key=lambda index: points[index])
