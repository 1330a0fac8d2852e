"""Token merging in diffusers' UNets and ControlNets, by forward hooks alone.

    UNet                  pre:  note the timestep, where the partition is random
    Transformer2DModel    pre:  note the token grid
    BasicTransformerBlock pre:  one token map from the block's input features
      attn1 | attn2 | ff  pre:  merge          post: unmerge
    BasicTransformerBlock post: forget the map

The residual stream stays at full resolution, so small differences between merged tokens survive.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tomesd.partition import make_key
from tomesd.patches.common import Patch, Row
from tomesd.settings import DiffusionSettings
from tomesd.token_map import TokenMap

MODELS = ("UNet2DConditionModel", "ControlNetModel")


@dataclass(eq=False)
class _Clock:
    """The denoising step, known by its timestep."""

    timestep: Tensor | float = 0

    def read(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.timestep = args[1] if len(args) > 1 else kwargs["timestep"]


@dataclass(eq=False)
class _Grid:
    """The h×w tokens of the transformer that runs, exact for every picture size."""

    h: int = 0
    w: int = 0

    def read(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.h, self.w = x.shape[-2:]


@dataclass(eq=False)
class _Block:
    """The hooks of one transformer block and the token map that they share while it runs."""

    index: int
    settings: DiffusionSettings
    grid: _Grid
    clock: _Clock
    map: TokenMap = field(init=False)

    def match(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        features = args[0] if args else kwargs["hidden_states"]
        settings, key = self.settings, None
        if settings.is_random:
            key = make_key(settings.seed, self.clock.timestep, self.index).to(features.device)
        self.map = settings.token_map(features, self.grid.h, self.grid.w, key)

    def forget(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        del self.map

    def merge_self_attention(self, attn: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask on self-attention cannot be combined with merged tokens; "
                "remove_patch first, or leave attention_mask=None"
            )
        x, *rest = args
        merged = self.map.merge(x)
        if self.settings.weighs_keys:
            # [B, 1, M]: the same for every head and query.
            bias = self.map.size.log().transpose(1, 2).to(x.dtype)
            kwargs = kwargs | {"attention_mask": bias}
        if self.settings.merge_queries:
            return (merged, *rest), kwargs
        return args, kwargs | {"encoder_hidden_states": merged}

    def merge(self, branch: nn.Module, args: tuple, kwargs: dict) -> tuple:
        x, *rest = args
        return (self.map.merge(x), *rest), kwargs

    def unmerge(self, branch: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.map.unmerge(output)


@dataclass(eq=False)
class _Transformer:
    """One Transformer2DModel, or another module in its place: where it is and what merges there."""

    where: str
    downsample: int
    module: Any
    skipped: str
    grid: _Grid = field(default_factory=_Grid)


class UNetPatch(Patch):
    """Token merging on one UNet or ControlNet.

    Nothing of the model is touched before `install`; whatever speaks against merging is raised
    when the patch is made.
    """

    def __init__(self, model: Any, settings: DiffusionSettings):
        super().__init__()
        self.settings = settings
        self.model = model
        self.transformers = _find_transformers(model, settings)
        if settings.ratio > 0 and all(found.skipped for found in self.transformers):
            reasons = {found.skipped for found in self.transformers} or {"it has no attention"}
            raise ValueError(
                f"nothing would be merged in {type(model).__name__}: {'; '.join(sorted(reasons))}"
            )

    def install(self) -> None:
        if self.settings.ratio == 0:
            return
        clock, index = _Clock(), 0
        if self.settings.is_random:
            self.before(self.model, clock.read)
        for found in self.transformers:
            if found.skipped:
                continue
            self.before(found.module, found.grid.read)
            for block in found.module.transformer_blocks:
                self._install_block(block, _Block(index, self.settings, found.grid, clock))
                index += 1

    def _install_block(self, block: Any, hooks: _Block) -> None:
        settings = self.settings
        self.before(block, hooks.match)
        if settings.merge_attn and not block.only_cross_attention:
            self.before(block.attn1, hooks.merge_self_attention)
            if settings.merge_queries:
                self.after(block.attn1, hooks.unmerge)
        branches = [block.attn2] if settings.merge_crossattn and block.attn2 is not None else []
        for branch in branches + [block.ff] * settings.merge_mlp:
            self.before(branch, hooks.merge)
            self.after(branch, hooks.unmerge)
        self.after(block, hooks.forget)

    def rows(self) -> list[Row]:
        rows: dict[tuple, Row] = {}
        for found in self.transformers:
            h, w = found.grid.h, found.grid.w
            if not h:
                size = self.model.config.sample_size or 0
                h, w = (size, size) if isinstance(size, int) else size
                h, w = -(-h // found.downsample), -(-w // found.downsample)
            tokens = merged = h * w
            work = 1.0
            note = found.skipped or ("ratio is 0" if self.settings.ratio == 0 else "")
            if not note and tokens:
                merged = tokens - self.settings.merged(h, w)
                if self.settings.merge_attn:
                    work = (merged / tokens) ** (2 if self.settings.merge_queries else 1)
            where = f"1/{found.downsample} {found.where}"
            blocks = len(getattr(found.module, "transformer_blocks", []))
            rows[where, note] = Row(where, blocks, tokens, merged, work, note)
        return list(rows.values())


def _find_transformers(model: Any, settings: DiffusionSettings) -> list[_Transformer]:
    factors = []
    factor = 1
    for block in model.down_blocks:
        factors.append(factor)
        factor *= 2 if getattr(block, "downsamplers", None) else 1
    parts = [(f"down_blocks.{i}", factors[i], block) for i, block in enumerate(model.down_blocks)]
    parts.append(("mid_block", factor, model.mid_block))
    for i, block in enumerate(getattr(model, "up_blocks", [])):
        parts.append((f"up_blocks.{i}", factors[-1 - i], block))
    found = [
        _Transformer(where, factor, module, "")
        for where, factor, block in parts
        for module in getattr(block, "attentions", [])
    ]
    finest = min((transformer.downsample for transformer in found), default=1)
    for transformer in found:
        transformer.skipped = _why_skipped(transformer, finest, settings)
    return found


def _why_skipped(transformer: _Transformer, finest: int, settings: DiffusionSettings) -> str:
    module: Any = transformer.module
    if type(module).__name__ != "Transformer2DModel":
        return f"{type(module).__name__} is not a spatial transformer"
    if transformer.downsample > finest * settings.max_downsample:
        return f"coarser than max_downsample={settings.max_downsample}"
    for block in module.transformer_blocks:
        if settings.merge_mlp and block._chunk_size is not None:
            raise ValueError(
                "merge_mlp must be False with feed-forward chunking, got True: "
                "disable_forward_chunking() on the model, or leave the MLP unmerged"
            )
        if block.only_cross_attention and not (settings.merge_crossattn or settings.merge_mlp):
            return "its blocks have no self-attention"
    return ""
