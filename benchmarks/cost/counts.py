"""FLOPs of one forward of a denoiser, and of the blocks in which tokens merge.

Models are counted by torch.utils.flop_counter on the meta device: shapes without values, so nothing
is computed and no weights are needed. What merging saves comes from `tomesd.core.workload`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.models import unets
from benchmarks.models.transformers import FLUX, SD3, TEXT_TOKENS
from benchmarks.models.unets import Level
from tomesd.core import merging_work, workload
from tomesd.core.workload import Branches, Work

# All sides here are multiples of this, in pixels; every model allows it.
STEP = 64


@dataclass(frozen=True)
class Model:
    """A denoiser to count.

    >>> MODELS["sd15"].title
    'SD1.5'

    class_name: in diffusers. batch: of one picture, 2 with guidance.
    """

    title: str
    class_name: str
    config: dict[str, Any]
    batch: int
    text_tokens: int

    @property
    def joint(self) -> bool:
        """Whether text and image tokens share attention, as in SD3 and Flux but not in UNets."""
        return self.class_name != "UNet2DConditionModel"


MODELS = {
    "sd15": Model("SD1.5", "UNet2DConditionModel", unets.SD15, 2, unets.PROMPT_TOKENS),
    "sdxl": Model("SDXL", "UNet2DConditionModel", unets.SDXL, 2, unets.PROMPT_TOKENS),
    "sd3": Model("SD3 medium", "SD3Transformer2DModel", SD3, 2, TEXT_TOKENS["sd3"]),
    "flux": Model("Flux.1", "FluxTransformer2DModel", FLUX, 1, TEXT_TOKENS["flux"]),
}


class Count(NamedTuple):
    """One forward at one size.

    convolutions, attention, linear: FLOPs of the whole model. levels: those with attention, finest
    first.
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

    def patch(
        self, level: Level, r: int, branches: Branches, window: int | None, fused: bool = False
    ) -> list[Work]:
        """The work of merging r tokens in one block of a level."""
        return merging_work.patch(
            self.batch,
            level.h * level.w,
            level.channels,
            r,
            branches=branches,
            destinations=_destinations(level, r),
            window=window,
            fused=fused,
        )

    def ideal(self, ratio: float, branches: Branches, everywhere: bool = False) -> float:
        """The speedup by FLOPs if matching and merging cost nothing.

        >>> round(count(MODELS["sd15"], 512).ideal(0.5, Branches()), 2)
        1.12

        everywhere: merge at every level; otherwise at the finest with attention.
        """
        saved = 0
        for level in self.levels if everywhere else self.levels[:1]:
            less = workload.flops(self.block(level, merged(level, ratio), branches))
            saved += level.blocks * (workload.flops(self.block(level)) - less)
        return self.flops / (self.flops - saved)


def count(model: Model, size: int, batch: int | None = None) -> Count:
    """FLOPs of one forward of a denoiser, exactly as torch counts them.

    >>> counted = count(MODELS["sd15"], 512, batch=1)
    >>> counted.convolutions, counted.levels[0]
    (443946106880, Level(h=64, w=64, channels=320, blocks=5))

    size: of the square picture, in pixels. batch: that of one picture by default.
    Raises ValueError if the size is not a positive multiple of 64.
    """
    if size < STEP or size % STEP:
        raise ValueError(f"size must be a positive multiple of {STEP}, got {size}")
    from torch.utils.flop_counter import FlopCounterMode  # Late: it imports Triton.

    batch = batch or model.batch
    denoiser, args, kwargs = _empty(model, size, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(*args, **kwargs)
    flops = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    convolutions = flops.pop("aten.convolution", 0)
    attention = flops.pop("aten.bmm", 0)  # Two batched products on the meta device.
    own = _joint_levels(denoiser, size) if model.joint else unets.levels(model.config, size // 8)
    return Count(model, size, batch, convolutions, attention, sum(flops.values()), own)


def _empty(model: Model, size: int, batch: int) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """A denoiser on the meta device and the arguments of one forward."""
    meta = torch.device("meta")
    if not model.joint:
        args, kwargs = unets.unet_inputs(model.config, batch, size // 8, meta, torch.float32)
        return unets.empty_unet(model.config), args, kwargs
    import diffusers  # Late: the import takes seconds, and --help does not need it.

    side = size // 16
    with meta:
        denoiser = (
            getattr(diffusers, model.class_name)
            .from_config(model.config)
            .eval()
            .requires_grad_(False)
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
        if (
            model.class_name == "FluxTransformer2DModel"
        ):  # Its pipeline packs the latents into patches.
            inputs["hidden_states"] = torch.empty(batch, side * side, config.in_channels)
            inputs["img_ids"] = torch.empty(side * side, 3)
            inputs["txt_ids"] = torch.empty(model.text_tokens, 3)
            inputs["guidance"] = torch.empty(batch)
    return denoiser, (), inputs


def _joint_levels(denoiser: Any, size: int) -> list[Level]:
    """One level: all blocks see the same tokens, of 16×16 pixels each."""
    blocks = [*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", [])]
    return [Level(size // 16, size // 16, denoiser.inner_dim, len(blocks))]


def merged(level: Level, ratio: float) -> int:
    """How many tokens of a level merge."""
    return int(ratio * level.h * level.w)


def _destinations(level: Level, r: int) -> int:
    """One token in each cell of 2×2, or of 4×4 where r is larger than that allows."""
    cells = -(-level.h // 2) * -(-level.w // 2)
    if r <= level.h * level.w - cells:
        return cells
    return -(-level.h // 4) * -(-level.w // 4)
