"""The cost model's tables: work at each level of a denoiser, and what merging can gain there.

Whole models are counted by torch.utils.flop_counter on the meta device: shapes without values, so
nothing is computed and no weights are needed. What merging takes away comes from `tomesd.core.cost`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.speed import full_size
from benchmarks.models.unets import Level
from tomesd.core import cost, workload
from tomesd.core.workload import Branches, Work

# Stable Diffusion 3 medium: 2,028,328,000 parameters.
SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

# Flux.1 dev: 11,901,408,320 parameters.
FLUX: dict[str, Any] = {"guidance_embeds": True}

# What may merge, by the names that the tables use.
MERGES = {
    "attention": Branches(),
    "keys and values": Branches(merge_queries=False),
    "blocks": Branches(merge_block=True),
}

# As much of what merging could save at best is to be reached.
SHARE = 0.95

# The sides of all pictures here are multiples of this: every model divides them by less.
STEP = 64

# The tables' bytes are those of half precision.
_ITEMSIZE = 2


@dataclass(frozen=True)
class Model:
    """A denoiser to count. batch: of one picture, 2 where guidance doubles it.

    made: the name of its class in diffusers.
    """

    title: str
    made: str
    config: dict[str, Any]
    batch: int
    text_tokens: int

    @property
    def joint(self) -> bool:
        """Whether text and image tokens share attention, as in SD3 and Flux but not in UNets."""
        return self.made != "UNet2DConditionModel"


# The text as their pipelines hand it over by default: CLIP's tokens, for SD3 with 256 of T5's, for
# Flux 512 of T5's alone.
MODELS = {
    "sd15": Model("SD1.5", "UNet2DConditionModel", full_size.SD15, 2, full_size.PROMPT_TOKENS),
    "sdxl": Model("SDXL", "UNet2DConditionModel", full_size.SDXL, 2, full_size.PROMPT_TOKENS),
    "sd3": Model("SD3 medium", "SD3Transformer2DModel", SD3, 2, 77 + 256),
    "flux": Model("Flux.1", "FluxTransformer2DModel", FLUX, 1, 512),
}


class Count(NamedTuple):
    """One forward at one size. convolutions, attention, linear: FLOPs, everything that is there.

    levels: those with attention, finest first.
    """

    model: Model
    size: int
    batch: int
    convolutions: int
    attention: int
    linear: int
    levels: list[Level]

    @property
    def flops(self) -> int:
        return self.convolutions + self.attention + self.linear

    def block(self, level: Level, r: int = 0, branches: Branches | None = None) -> list[Work]:
        """The work of one block of a level, with r tokens merged."""
        at = (self.batch, level.h * level.w, level.channels)
        text = self.model.text_tokens
        if self.model.joint:
            return workload.joint_block(*at, r=r, branches=branches, text_tokens=text)
        wide = self.model.config["cross_attention_dim"]
        return workload.block(*at, r=r, branches=branches, text_tokens=text, text_channels=wide)

    def patch(self, level: Level, r: int, branches: Branches, window: int | None) -> list[Work]:
        """What merging r tokens in one block of a level takes."""
        return workload.patch(
            self.batch,
            level.h * level.w,
            level.channels,
            r,
            branches=branches,
            destinations=_destinations(level, r),
            window=window,
        )

    def ideal(self, ratio: float, branches: Branches, everywhere: bool = False) -> float:
        """How many times as fast merging is at best, by FLOPs: matching and merging cost nothing.

        >>> round(count(MODELS["sd15"], 512).ideal(0.5, Branches()), 2)
        1.12

        everywhere: at every level; otherwise at the finest with attention.
        """
        saved = 0
        for level in self.levels if everywhere else self.levels[:1]:
            less = workload.flops(self.block(level, _merged(level, ratio), branches))
            saved += level.blocks * (workload.flops(self.block(level)) - less)
        return self.flops / (self.flops - saved)


def count(model: Model, size: int, batch: int | None = None) -> Count:
    """FLOPs of one forward of a denoiser, exactly as torch counts them.

    >>> counted = count(MODELS["sd15"], 512, batch=1)
    >>> counted.convolutions, counted.levels[0]
    (443946106880, Level(h=64, w=64, channels=320, blocks=5))

    size: of the picture, in pixels, square. batch: default that of one picture.
    Raises ValueError if the size is no positive multiple of 64.
    """
    if size < STEP or size % STEP:
        raise ValueError(f"size must be a positive multiple of {STEP}, got {size}")
    from torch.utils.flop_counter import FlopCounterMode  # Late: it draws in Triton.

    batch = batch or model.batch
    denoiser, args, kwargs = _empty(model, size, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(*args, **kwargs)
    flops = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    convolutions = flops.pop("aten.convolution", 0)
    attention = flops.pop("aten.bmm", 0)  # on the meta device two batched products
    if model.joint:
        levels = _joint_levels(denoiser, size)
    else:
        levels = full_size.levels(model.config, size // 8)
    return Count(model, size, batch, convolutions, attention, sum(flops.values()), levels)


def _empty(model: Model, size: int, batch: int) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """A denoiser without values and the arguments of one forward."""
    meta = torch.device("meta")
    if not model.joint:
        args, kwargs = full_size.unet_inputs(model.config, batch, size // 8, meta, torch.float32)
        return full_size.empty_unet(model.config), args, kwargs
    import diffusers  # Late: it takes seconds, and a script's --help needs none of it.

    side = size // 16
    with meta:
        denoiser = (
            getattr(diffusers, model.made).from_config(model.config).eval().requires_grad_(False)
        )
        config = denoiser.config
        inputs = {
            "hidden_states": torch.empty(batch, config.in_channels, 2 * side, 2 * side),
            "encoder_hidden_states": torch.empty(
                batch, model.text_tokens, config.joint_attention_dim
            ),
            "pooled_projections": torch.empty(batch, config.pooled_projection_dim),
            "timestep": torch.empty(batch),
        }
        if model.made == "FluxTransformer2DModel":  # Its pipeline makes the latents' patches.
            inputs["hidden_states"] = torch.empty(batch, side * side, config.in_channels)
            inputs["img_ids"] = torch.empty(side * side, 3)
            inputs["txt_ids"] = torch.empty(model.text_tokens, 3)
            inputs["guidance"] = torch.empty(batch)
    return denoiser, (), inputs


def _joint_levels(denoiser: Any, size: int) -> list[Level]:
    """All blocks see the same tokens, of 16×16 pixels each."""
    blocks = [*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", [])]
    return [Level(size // 16, size // 16, denoiser.inner_dim, len(blocks))]


def _merged(level: Level, ratio: float) -> int:
    return int(ratio * level.h * level.w)


def _destinations(level: Level, r: int) -> int:
    """One token in each cell of 2×2, or of 4×4 where r is more than that allows."""
    cells = -(-level.h // 2) * -(-level.w // 2)
    if r <= level.h * level.w - cells:
        return cells
    return -(-level.h // 4) * -(-level.w // 4)


def levels_table(counts: Iterable[Count], ratio: float, window: int) -> str:
    """Markdown: the work of one block at each level, GFLOP (GB).

    >>> print(levels_table([count(MODELS["sd15"], 512)], ratio=0.5, window=32))
    | model | px | tokens × channels | blocks | attention | linear layers | ...

    ratio: of the tokens, for what matching, merging and unmerging take.
    """
    lines = _heading(
        "model",
        "px",
        "tokens × channels",
        "blocks",
        "attention",
        "linear layers",
        "matching",
        "matching, no windows",
        "merge",
        "unmerge",
    )
    for counted, level in _each_level(counts):
        r = _merged(level, ratio)
        block = counted.block(level)
        near, far = (counted.patch(level, r, Branches(), side) for side in (window, None))
        lines.append(
            _line(
                *_place(counted, level),
                str(level.blocks),
                _work(block, "attention"),
                _work(block, "linear"),
                _work(near, "match"),
                _work(far, "match"),
                _work(near, "merge"),
                _work(near, "unmerge"),
            )
        )
    return "\n".join(lines)


def shares_table(counts: Iterable[Count]) -> str:
    """Markdown: FLOPs of one forward, and what they are spent on.

    >>> print(shares_table([count(MODELS["sd15"], 512)]))
    | model | px | batch | TFLOP | convolutions | attention | linear layers | ...

    The last columns: how much of all is in the blocks of the finest level with attention, where
    merging acts by default, and in all blocks: a little above 100% for SD3, whose last block leaves
    out a part of its text.
    """
    lines = _heading(
        "model",
        "px",
        "batch",
        "TFLOP",
        "convolutions",
        "attention",
        "linear layers",
        "blocks of the finest level",
        "all blocks",
    )
    for counted in counts:
        inside = [level.blocks * workload.flops(counted.block(level)) for level in counted.levels]
        parts = [counted.convolutions, counted.attention, counted.linear, inside[0], sum(inside)]
        cells = [counted.model.title, str(counted.size), str(counted.batch)]
        shares = [f"{part / counted.flops:.0%}" for part in parts]
        lines.append(_line(*cells, _figure(counted.flops / 1e12), *shares))
    return "\n".join(lines)


def ideal_table(counts: Iterable[Count], ratios: Sequence[float]) -> str:
    """Markdown: how many times as fast a whole forward is at best, at these ratios.

    >>> print(ideal_table([count(MODELS["sd15"], 512)], ratios=[0.5]))
    | model | px | attention, finest level | ...

    Everything is counted, convolutions too, in FLOPs alone; matching and merging cost nothing.
    """
    columns = [
        (f"{name}, {where}", branches, where == "every level")
        for name, branches in MERGES.items()
        for where in ("finest level", "every level")
    ]
    lines = _heading("model", "px", *(name for name, _, _ in columns))
    for counted in counts:
        cells = []
        for _, branches, everywhere in columns:
            if everywhere and len(counted.levels) == 1:
                cells.append("the same")
                continue
            gains = [counted.ideal(ratio, branches, everywhere) for ratio in ratios]
            cells.append(" / ".join(f"{gain:.2f}" for gain in gains))
        lines.append(_line(counted.model.title, str(counted.size), *cells))
    return "\n".join(lines)


def budget_table(counts: Iterable[Count], ratio: float, window: int) -> str:
    """Markdown: what merging saves in one block, may spend and is estimated to spend.

    >>> print(budget_table([count(MODELS["sd15"], 512)], ratio=0.5, window=32))
    | model | px | tokens × channels | what merges | cpu, ms: saves | may spend | ...

    It may spend 5% of what it saves, so that 95% of the ideal saving is reached. Milliseconds on
    the CPU and microseconds on the GPU whose rates `tomesd.core.cost` has.
    """
    units = (("cpu", "ms", 1e3), ("cuda", "µs", 1e6))
    each = [(f"{kind}, {unit}: saves", "may spend", "spends", "pays") for kind, unit, _ in units]
    lines = _heading(
        "model", "px", "tokens × channels", "what merges", *(name for four in each for name in four)
    )
    for counted, level in _each_level(counts):
        r = _merged(level, ratio)
        for name, branches in MERGES.items():
            full, less = counted.block(level), counted.block(level, r, branches)
            own = counted.patch(level, r, branches, window)
            cells = [*_place(counted, level), name]
            for kind, _, times in units:
                saved = cost.seconds(full, kind) - cost.seconds(less, kind)
                spent = cost.seconds(own, kind)
                cells += [_figure(times * part) for part in (saved, (1 - SHARE) * saved, spent)]
                cells.append("yes" if saved > spent else "no")
            lines.append(_line(*cells))
    return "\n".join(lines)


def _each_level(counts: Iterable[Count]) -> list[tuple[Count, Level]]:
    return [(counted, level) for counted in counts for level in counted.levels]


def _place(counted: Count, level: Level) -> list[str]:
    where = f"{level.h * level.w:,} × {level.channels:,}"
    return [counted.model.title, str(counted.size), where]


def _work(work: Iterable[Work], part: str) -> str:
    """FLOPs, and bytes in brackets, of one part."""
    chosen = [each for each in work if each.part == part]
    moved = f"({_figure(_ITEMSIZE * workload.elements(chosen) / 1e9)})"
    flops = workload.flops(chosen)
    return f"{_figure(flops / 1e9)} {moved}" if flops else moved


def _figure(value: float) -> str:
    """Two digits at least, never a power of ten."""
    if value == 0 or value >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


def _heading(*cells: str) -> list[str]:
    return [_line(*cells), "|---" * len(cells) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
