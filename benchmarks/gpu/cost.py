"""What the patch itself costs: match, merge, unmerge."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common.timing import Spread, interleave, seconds
from benchmarks.gpu.context import PEER, Case, Context, Row, with_kernels
from benchmarks.models.unets import Level
from benchmarks.peer.process import Peer
from benchmarks.speed.patch_cost import STEPS, own_steps
from tomesd import kernels
from tomesd.diffusion.block import add_residual
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.settings import DiffusionSettings

BATCH = 2
SETTINGS = DiffusionSettings(ratio=0.5)

# Tiles of matching that are worth a try: sources, destinations, channels, warps, stages.
TILES = (
    *((64, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (32, 64, 64, 4, 3)),
    *((128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (32, 32, 64, 4, 4), (64, 64, 32, 4, 4)),
)


def cases(context: Context) -> Sequence[Case]:
    if context.quick:
        shapes = [(16, 32)]
    else:
        shapes = [(64, 320), (128, 320), (256, 320), (32, 1280), (64, 1536), (64, 3072)]
    levels = [Level(side, side, channels, 1) for side, channels in shapes]
    return [
        *(Case(_name(level), partial(steps, context, level), 8) for level in levels),
        *(
            Case(f"{_name(level)}, as one captured graph", partial(captured, context, level), 8)
            for level in levels
        ),
        *(
            Case(f"{_name(level)}, tiles", partial(tiles, context, level), 20)
            for level in levels[:2]
        ),
    ]


def steps(context: Context, level: Level) -> Row:
    """Seconds of each step, as an eager model calls them: kernels, PyTorch and the peer."""
    x = _tokens(context, level)
    runs: dict[str, Callable[[], dict[str, float]]] = {}

    def own(fused: bool) -> dict[str, float]:
        with with_kernels(fused):
            return own_steps(SETTINGS, x, level)

    runs["kernels"], runs["PyTorch"] = partial(own, True), partial(own, False)
    if "tomesd" not in context.peers:
        return _spread(context, runs)
    with Peer(context.peers["tomesd"]) as peer:
        runs[PEER] = partial(
            peer.ask,
            "merging",
            batch=BATCH,
            h=level.h,
            w=level.w,
            channels=level.channels,
            settings={"ratio": 0.5, "sx": 2, "sy": 2, "use_rand": False},
            device=str(context.device),
            dtype=str(context.dtype).removeprefix("torch."),
        )
        return _spread(context, runs)


def _spread(context: Context, runs: dict[str, Callable[[], dict[str, float]]]) -> Row:
    for run in runs.values():
        run()
    times = interleave(runs, context.rounds)
    return {
        name: {
            **{step: asdict(Spread.of([each[step] for each in own])) for step in STEPS},
            "all": asdict(Spread.of([sum(each.values()) for each in own])),
        }
        for name, own in times.items()
    }


def captured(context: Context, level: Level) -> Row:
    """Seconds of a whole block's steps without launches: replayed as one CUDA graph."""
    x = _tokens(context, level)
    matcher = Matcher(SETTINGS)

    def block() -> Tensor:
        token_map = matcher.token_map(x, level.h, level.w, 0.5, None)
        merged = token_map.merge(x)
        return add_residual(token_map, x, merged, merged)

    runs = {}
    for name, fused in (("kernels", True), ("PyTorch", False)):
        with with_kernels(fused), torch.no_grad():
            runs[name] = partial(seconds, _replay(context, block), context.device)
    times = interleave(runs, 5 * context.rounds)
    return {name: asdict(Spread.of(own)) for name, own in times.items()}


def _replay(context: Context, run: Callable[[], Tensor]) -> Callable[[], object]:
    run()
    if not context.is_gpu:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def tiles(context: Context, level: Level) -> Row:
    """Seconds of matching with other tiles, captured; the first is what is used."""
    x = _tokens(context, level)
    matcher = Matcher(SETTINGS)
    runs, failed = {}, {}
    for tile in TILES:
        names = ("SRC", "DST", "BLOCK", "num_warps", "num_stages")
        chosen = dict(zip(names, tile, strict=True))

        def match(chosen: dict[str, int] = chosen) -> Tensor:
            if not kernels.available(context.device):  # There is nothing to choose from.
                return matcher.token_map(x, level.h, level.w, 0.5, None).size
            from tomesd.kernels import launches  # Late: it imports Triton.

            with patch.object(launches, "match_tile", lambda dtype: chosen):
                return matcher.token_map(x, level.h, level.w, 0.5, None).size

        name = "×".join(map(str, tile[:3])) + f", {tile[3]} warps, {tile[4]} stages"
        try:
            with torch.no_grad():
                runs[name] = partial(seconds, _replay(context, match), context.device)
        except Exception as error:  # It may need more shared memory than there is.
            failed[name] = {"error": str(error).partition("\n")[0]}
    times = interleave(runs, 5 * context.rounds)
    return failed | {name: asdict(Spread.of(own)) for name, own in times.items()}


def _tokens(context: Context, level: Level) -> Tensor:
    return context.noise(BATCH, level.h * level.w, level.channels)


def _name(level: Level) -> str:
    return f"{level.h * level.w:,} × {level.channels:,}"
