"""What `scripts/benchmark.py` measures: forwards of a denoiser, and the patch's own steps."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.device import PRECISIONS
from benchmarks.common.files import versions
from benchmarks.common.memory import Peak, first_line, in_child, peak_memory, ran_out
from benchmarks.common.timing import (
    Spread,
    interleave,
    merging_seconds,
    round_ratio,
    seconds,
    share_of_ideal,
)
from benchmarks.speed import full_size
from benchmarks.speed.ideal_transformer import install_ideal
from benchmarks.peer.process import Peer, PeerError
from benchmarks.speed.variants import Variant, forward, prepare
from tomesd.core.partition import make_key
from tomesd.diffusion.settings import DiffusionSettings

STEPS = ("match", "merge", "unmerge")


@dataclass(frozen=True)
class Setup:
    """What all measurements share, checked.

    compiled: torch.compile's mode; None runs eagerly.
    """

    denoiser: full_size.Denoiser
    sizes: list[int]
    variants: list[Variant]
    batch: int
    rounds: int
    device: torch.device
    precision: str
    compiled: str | None
    measures_memory: bool
    peer: Path | None
    peer_name: str

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def warm_ups(self) -> int:
        """Forwards before the first that counts. "reduce-overhead" runs once as usual and once more
        to record its CUDA graphs."""
        return 3 if self.compiled and self.device.type == "cuda" else 1

    def latents(self, size: int) -> int:
        """The side of a picture in latents, or in a transformer's tokens."""
        return size // self.denoiser.pixels

    def inputs(self, size: int) -> tuple[tuple, dict[str, Any]]:
        """Arguments of one forward."""
        return self.denoiser.inputs(self.batch, self.latents(size), self.device, self.dtype)

    def peer_settings(self, settings: DiffusionSettings) -> dict[str, Any]:
        """What the other release understands. It counts levels from the latents, not from the
        finest one with attention: on SDXL its max_downsample=1 would do nothing."""
        names = ("ratio", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")
        known = {name: getattr(settings, name) for name in names}
        if settings.merge_block:  # The same branches, though it knows them one by one only.
            known |= dict.fromkeys(("merge_attn", "merge_crossattn", "merge_mlp"), True)
        return known | {"max_downsample": settings.max_downsample * self.finest_level}

    @cached_property
    def finest_level(self) -> int:
        """How much coarser than the latents the finest level with attention is."""
        size = self.latents(self.sizes[0])
        return -(-size // self.denoiser.levels(size)[0].h)


@contextmanager
def record_failure(row: dict[str, Any]) -> Iterator[None]:
    """Where memory runs out or another release fails, the row says so, and all others go on.

    >>> row = {}
    >>> with record_failure(row):
    ...     raise MemoryError("forward_peak was killed in its process (exit code -9)")
    >>> row["error"]
    'forward_peak was killed in its process (exit code -9)'
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, PeerError) or ran_out(error)):
            raise
        row["error"] = first_line(error)


def measure_forwards(setup: Setup) -> Iterator[list[dict]]:
    """The rows of each size, one for each variant. Memory of all sizes first, while no other model
    is loaded; what needs too much of it is not tried in this process."""
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
        peer = start_peer(setup, stack)
        twins = {
            variant.name: ready(full_size.share_weights(model), variant)
            for variant in setup.variants
            if variant.kind != "peer"
        }
        for same in rows.values():
            measure_size(setup, same, twins, peer)
            yield same


def ready(model: Any, variant: Variant) -> Any:
    """A UNet or a transformer as the variant has it, changed in place; raises what `prepare` does.

    >>> model = ready(model, Variant("ideal 0.5", "ideal", DiffusionSettings(ratio=0.5)))
    """
    if variant.kind != "ideal" or type(model).__name__ == "UNet2DConditionModel":
        return prepare(model, variant)
    assert variant.settings is not None
    install_ideal(model, variant.settings)
    return model


def start_peer(setup: Setup, stack: ExitStack) -> Peer | None:
    """The other release with its weights loaded, or None if it was not asked for."""
    if setup.peer is None:
        return None
    peer = stack.enter_context(Peer(setup.peer))
    dtype = str(setup.dtype).removeprefix("torch.")
    peer.ask("load", config=setup.denoiser.config, device=str(setup.device), dtype=dtype)
    return peer


def patch_peer(setup: Setup, peer: Peer, variant: Variant) -> dict[str, Any]:
    """Let the peer patch a model for this variant; returns the settings that it was given."""
    assert variant.settings is not None
    settings = setup.peer_settings(variant.settings)
    peer.ask("patch", variant=variant.name, settings=settings, compiled=setup.compiled)
    return settings


def measure_memory(setup: Setup) -> Iterator[list[dict]]:
    """The rows of each size, one for each variant: memory alone, each in a process of its own."""
    for size in setup.sizes:
        rows = []
        for variant in tqdm(setup.variants, desc=f"{size} px, memory", unit="process"):
            rows.append(new_row(variant, size))
            with record_failure(rows[-1]):
                rows[-1]["memory"] = child_peak(setup, variant, size)
        yield rows


def child_peak(setup: Setup, variant: Variant, size: int) -> dict[str, int] | None:
    """Memory of one forward in a process of its own; None if the peer cannot."""
    if variant.kind != "peer":
        return in_child(forward_peak, setup, variant, size)._asdict()
    with ExitStack() as stack:
        try:
            peer = start_peer(setup, stack)
            assert peer is not None
            patch_peer(setup, peer, variant)
            asked = {"batch": setup.batch, "size": setup.latents(size)}
            before, peak = peer.ask("peak", variant=variant.name, **asked)
        except PeerError:
            return None
    return {"before": before, "peak": peak}


def forward_peak(setup: Setup, variant: Variant, size: int) -> Peak:
    """Memory of one forward; on the CPU, call it in a fresh process (`memory.in_child`).

    >>> peak = in_child(forward_peak, setup, Variant("unpatched", "unpatched"), 512)
    """
    model = ready(setup.denoiser.build(setup.device, setup.dtype), variant)
    call = forward(model, setup.inputs(size), setup.compiled)
    if setup.device.type == "cuda":  # The first call allocates what later ones share.
        call()
    return peak_memory(call, setup.device)


def measure_size(setup: Setup, rows: list[dict], twins: dict[str, Any], peer: Peer | None) -> None:
    """Time all rows of a size in turns, but those that failed; what is found goes into them."""
    runs: dict[str, Callable[[], float]] = {}
    size = rows[0]["size"]
    tasks = list(zip(setup.variants, rows, strict=True))
    for variant, row in tqdm(tasks, desc=f"{size} px, warming up", unit="forward"):
        if "error" in row:
            continue
        with record_failure(row):
            if variant.kind == "peer":
                assert peer is not None
                runs[variant.name] = peer_run(setup, peer, variant, size, row)
            else:
                runs[variant.name] = our_run(setup, twins[variant.name], size, row)
    with tqdm(total=setup.rounds * len(runs), desc=f"{size} px", unit="forward") as bar:
        times = interleave(runs, setup.rounds, bar.update)
    summarize({row["variant"]: row for row in rows}, times)


def new_row(variant: Variant, size: int) -> dict[str, Any]:
    return {
        "size": size,
        "variant": variant.name,
        "kind": variant.kind,
        "patch": asdict(variant.settings) if variant.settings else None,
        "memory": None,
    }


def our_run(setup: Setup, model: Any, size: int, row: dict) -> Callable[[], float]:
    """What times one forward, warmed up; on CUDA its memory goes into the row."""
    call = forward(model, setup.inputs(size), setup.compiled)
    for _ in range(setup.warm_ups):
        call()
    if setup.measures_memory and setup.device.type == "cuda":
        row["memory"] = peak_memory(call, setup.device)._asdict()
    return partial(seconds, call, setup.device)


def peer_run(
    setup: Setup, peer: Peer, variant: Variant, size: int, row: dict
) -> Callable[[], float]:
    """The same in the peer's process; in how many blocks it merges goes into the row too."""
    asked = {"variant": variant.name, "batch": setup.batch, "size": setup.latents(size)}
    row["patch"] = patch_peer(setup, peer, variant)
    row["blocks_merged"] = peer.ask("matches", **asked)
    for _ in range(setup.warm_ups):
        peer.ask("forward", **asked)
    if setup.measures_memory and setup.device.type == "cuda":
        before, peak = peer.ask("peak", **asked)
        row["memory"] = {"before": before, "peak": peak}
    return partial(peer.ask, "forward", **asked)


def summarize(rows: dict[str, dict], times: dict[str, list[float]]) -> None:
    """Add the figures to each row that was timed."""
    ideals = {row["patch"]["ratio"]: name for name, row in rows.items() if row["kind"] == "ideal"}
    base = times.get("unpatched")
    for name, taken in times.items():
        row = rows[name]
        row["seconds"] = taken
        row["median_seconds"] = asdict(Spread.of(taken))
        row["speedup"] = asdict(round_ratio(base, taken)) if base else None
        ideal = times.get(ideals.get(row["patch"]["ratio"], "")) if row["patch"] else None
        share = share_of_ideal(base, taken, ideal) if base and ideal else None
        row["share_of_ideal"] = asdict(share) if share else None


def measure_cost(setup: Setup) -> Iterator[list[dict]]:
    """The rows of each size, one for each level and variant: what matching, merging and unmerging
    take there."""
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(setup.peer)) if setup.peer else None
        for size in setup.sizes:
            levels = setup.denoiser.levels(setup.latents(size))
            yield [row for level in levels for row in measure_level(setup, size, level, peer)]


def measure_level(setup: Setup, size: int, level: full_size.Level, peer: Peer | None) -> list[dict]:
    shape = (setup.batch, level.h * level.w, level.channels)
    x = full_size.noise(shape, setup.device, setup.dtype)
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    rows = {}
    for variant in setup.variants:
        settings = variant.settings
        assert settings is not None
        if variant.kind == "peer":
            assert peer is not None
            runs[variant.name] = partial(
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
        else:
            runs[variant.name] = partial(our_steps, settings, x, level)
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
    name = f"{shape[1]} × {shape[2]}"
    with tqdm(total=setup.rounds * len(runs), desc=name, unit="run") as bar:
        steps = interleave(runs, setup.rounds, bar.update)
    totals = {name: [sum(taken.values()) for taken in steps[name]] for name in steps}
    for name, taken in steps.items():
        row = rows[name]
        row["seconds"] = taken
        for step in STEPS:
            row[step] = asdict(Spread.of([times[step] for times in taken]))
        row["all"] = asdict(Spread.of(totals[name]))
        other = f"{setup.peer_name} {row['patch']['ratio']:g}"
        if row["kind"] == "patched" and other in totals:
            row["share_of_peer"] = asdict(round_ratio(totals[name], totals[other]))
    return list(rows.values())


def our_steps(
    settings: DiffusionSettings, x: torch.Tensor, level: full_size.Level
) -> dict[str, float]:
    def match():
        key = make_key(settings.seed, 500).to(x.device) if settings.is_random else None
        found = settings.token_map(x, level.h, level.w, key)
        return partial(found.merge, how=settings.combine), found.unmerge

    with torch.no_grad():
        return merging_seconds(match, x)


def environment(setup: Setup) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(setup.device),
        "accelerator": torch.cuda.get_device_name(setup.device)
        if setup.device.type == "cuda"
        else None,
        "precision": setup.precision,
        "batch": setup.batch,
        "rounds": setup.rounds,
        "compiled": setup.compiled,
        **versions("tomesd", "torch", "diffusers"),
        "peer": setup.peer_name or None,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
