"""Which UNets merge and where, and how a block learns on which grid of tokens it is.

A transformer inside a UNet knows its picture's height and width; its blocks see a flat list of
tokens. So it hands them their place among the arguments that it passes on to them anyway.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from tomesd.core.token_map import TokenMap
from tomesd.diffusion.guidance import check_guidance
from tomesd.diffusion.ratio_schedule import RatioPlan
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.hooks import Threads

MODELS = (
    "UNet2DConditionModel",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
    "UNet3DConditionModel",
    "I2VGenXLUNet",
    "ControlNetModel",
    "ControlNetUnionModel",
    "SparseControlNetModel",
)

_NO_TRANSFORMERS = "it has no spatial transformers, whose blocks could merge"
REFUSED = {
    "Kandinsky3UNet": _NO_TRANSFORMERS,
    "StableCascadeUNet": _NO_TRANSFORMERS,
    "UNet2DModel": _NO_TRANSFORMERS,
    "UNet1DModel": "its tokens are moments of a signal, not of a grid",
    "UVit2DModel": "its transformers are in blocks that are not described yet",
    "UNetControlNetXSModel": "its transformers are in pairs, which are not described yet",
    "ControlNetXSAdapter": "it is a part of a UNetControlNetXSModel, which does not merge",
    "MotionAdapter": "it is a part of a UNetMotionModel: apply_patch that or its pipeline",
}

# The modules whose blocks merge, and their argument, a dict, that they hand on to them.
_SPATIAL = {
    "Transformer2DModel": "cross_attention_kwargs",
    "TransformerSpatioTemporalModel": "",
}

# Under which a block finds its place in that dict.
_PLACE = "tomesd_place"


class Place(NamedTuple):
    """What a block has to know of the forward pass that it is in."""

    h: int
    w: int
    timestep: Tensor | float
    stage: int = 0


FUSED = (
    "merge_queries must be True with fused projections, which know no separate keys, got False: "
    "unfuse_qkv_projections() on the model"
)


@dataclass(eq=False)
class Run:
    """What one thread is doing in one model, or in one of its transformers.

    timestep, stage: of the model's forward pass, where the partition is random or the ratio changes
    over the steps. place: of the transformer's, where it has no argument for it. Of its block that
    is running, map: the token map, None where nothing merges; whole, merged: the input before and
    after merging, where all of it runs on merged tokens.
    """

    timestep: Tensor | float = 0
    stage: int = 0
    place: Place | None = None
    map: TokenMap | None = None
    whole: Tensor | None = None
    merged: Tensor | None = None

    def forget_block(self) -> None:
        self.map = self.whole = self.merged = None


@dataclass(eq=False)
class Transformer:
    """One transformer of a UNet, or another module in its place: what merges there.

    Gradient checkpointing runs a block again, with the same arguments, when other forward passes
    may have come in between: what is not in the arguments would then be another pass's. Only a
    TransformerSpatioTemporalModel has no argument for it; there, the last pass counts.

    of_model: what threads are doing in all of it. settings: of each stage. most: those of the stage
    in which most merges. skipped: why nothing merges here. last: batch, height and width of its
    tokens and the kind of device in the last forward pass of any thread, zeros before the first.
    last_place: of that pass, for a block that is called again in a thread of autograd's own.
    threads: what they are doing here.
    """

    of_model: Threads[Run]
    where: str
    downsample: int
    module: Any
    settings: tuple[DiffusionSettings, ...]
    most: DiffusionSettings = field(init=False)
    skipped: str = ""
    last: tuple[int, int, int, str] = (0, 0, 0, "cpu")
    last_place: Place | None = None
    threads: Threads[Run] = field(default_factory=lambda: Threads(Run))

    def __post_init__(self) -> None:
        self.most = max(self.settings, key=lambda settings: settings.ratio)

    @property
    def h(self) -> int:
        return self.last[1]

    @property
    def w(self) -> int:
        return self.last[2]

    def why_not(self) -> str:
        """Why nothing merges here in a picture like the last one; empty if it does."""
        batch, h, w, device = self.last
        if self.skipped or not h:
            return self.skipped
        return self.most.why_not(device, batch, h, w, self.module.inner_dim)

    def announce(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Hand the place to the blocks."""
        x = args[0] if args else kwargs["hidden_states"]
        h, w = x.shape[-2:]
        self.last = len(x), h, w, x.device.type
        if self.skipped:
            return None
        if self.most.merge_attn and not self.why_not():
            for block in self.module.transformer_blocks:
                check_guidance(block.attn1, self.most.merge_queries, merges_keys=True)
        place = Place(h, w, self.of_model.run.timestep, self.of_model.run.stage)
        name = _SPATIAL[type(transformer).__name__]
        if not name:
            self.threads.run.place = self.last_place = place
            return None
        return args, kwargs | {name: (kwargs.get(name) or {}) | {_PLACE: place}}

    def place(self, given: dict) -> Place:
        """The place of a block with these arguments, which are then as the host made them."""
        name = _SPATIAL[type(self.module).__name__]
        if name:
            if _PLACE not in (given.get(name) or {}):
                raise ValueError(
                    f"{name} of a block in {self.where} must have the place of its tokens, which "
                    "its model puts there: call the model, or remove_patch to call blocks alone"
                )
            given[name] = dict(given[name])
            return given[name].pop(_PLACE)
        place = self.threads.run.place or self.last_place
        tokens = given["hidden_states"].shape[1]
        if place is None or tokens != place.h * place.w:
            raise ValueError(
                f"hidden_states of a block in {self.where} must be of the last forward pass, at "
                f"{place}, got {tokens} tokens: with gradient checkpointing, call backward before "
                "the model runs at another size"
            )
        return place


def find_transformers(
    model: Any, settings: DiffusionSettings, plan: RatioPlan, threads: Threads[Run]
) -> list[Transformer]:
    """All of a UNet's or ControlNet's, also those where nothing merges.

    Raises ValueError for settings that they cannot follow, and levels that they do not have.
    """
    factors = []
    factor = 1
    for block in model.down_blocks:
        factors.append(factor)
        factor *= 2 if getattr(block, "downsamplers", None) else 1
    parts = [(f"down_blocks.{i}", factors[i], block) for i, block in enumerate(model.down_blocks)]
    parts.append(("mid_block", factor, model.mid_block))
    for i, block in enumerate(getattr(model, "up_blocks", [])):
        parts.append((f"up_blocks.{i}", factors[-1 - i], block))
    modules = [
        (where, factor, module, _why_impossible(module, settings))
        for where, factor, block in parts
        for module in getattr(block, "attentions", [])
    ]
    able = sorted({factor for _, factor, _, why_not in modules if not why_not})
    plan.check_levels([factor // able[0] for factor in able])
    found = []
    for where, factor, module, why_not in modules:
        level = factor // able[0] if able else 1
        ratios = plan.of_level(level)
        of_stages = tuple(
            settings if ratio == settings.ratio else replace(settings, ratio=ratio)
            for ratio in ratios
        )
        if not why_not and not plan.names_levels and level > settings.max_downsample:
            why_not = f"coarser than max_downsample={settings.max_downsample}"
        found.append(
            Transformer(threads, where, factor, module, of_stages, why_not or _why_zero(ratios))
        )
    return found


def _why_zero(ratios: tuple[float, ...]) -> str:
    return "" if any(ratios) else "ratio is 0"


def _why_impossible(module: Any, settings: DiffusionSettings) -> str:
    if type(module).__name__ not in _SPATIAL:
        return f"{type(module).__name__} is not a spatial transformer"
    for block in module.transformer_blocks:
        name = "merge_block" if settings.merge_block else "merge_mlp"
        if getattr(settings, name) and block._chunk_size is not None:
            raise ValueError(
                f"{name} must be False with feed-forward chunking, got True: "
                "set_chunk_feed_forward(None) on the blocks, or leave the MLP unmerged"
            )
        if settings.merge_attn and not settings.merge_queries and block.attn1.fused_projections:
            raise ValueError(FUSED)
        others = settings.merge_crossattn or settings.merge_mlp or settings.merge_block
        if block.only_cross_attention and not others:
            return "its blocks have no self-attention"
    return ""
