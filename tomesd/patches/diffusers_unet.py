"""Token merging in diffusers' UNets and ControlNets, by forward hooks alone.

    UNet                  pre:  note the timestep, where the partition is random
    Transformer2DModel    pre:  hand the token grid and the timestep to the blocks
    BasicTransformerBlock pre:  one token map from the block's input features
      attn1 | attn2 | ff  pre:  merge          post: unmerge
    BasicTransformerBlock post: forget the map

Or, with merge_block, the block itself: pre: merge, post: x + unmerge(output − merged). Either way
the residual stream stays at full resolution, so small differences between merged tokens survive.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.partition import make_key
from tomesd.patches.common import Patch, Row
from tomesd.settings import DiffusionSettings
from tomesd.token_map import TokenMap

MODELS = ("UNet2DConditionModel", "ControlNetModel")

# The arguments of BasicTransformerBlock in order: gradient checkpointing passes them by position.
_BLOCK_ARGUMENTS = (
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
    "class_labels",
)

# Under which a block finds its token grid and timestep among its cross_attention_kwargs.
_PLACE = "tomesd_place"

# Attention processors that add the bias to float32 logits where the model says upcast_attention.
_UPCASTING = ("AttnProcessor", "SlicedAttnProcessor")


@dataclass(eq=False)
class _Transformer:
    """One Transformer2DModel, or another module in its place: where it is and what merges there.

    h, w: its tokens in the last forward pass; 0 before the first.
    """

    where: str
    downsample: int
    module: Any
    skipped: str = ""
    batch: int = 0
    h: int = 0
    w: int = 0
    device: str = "cpu"

    def read_grid(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.batch, _, self.h, self.w = x.shape
        self.device = x.device.type

    def why_not(self, settings: DiffusionSettings) -> str:
        """Why nothing merges here in a picture like the last one; empty if it does."""
        if self.skipped or not self.h:
            return self.skipped
        return settings.why_not(self.device, self.batch, self.h, self.w, self.module.inner_dim)


@dataclass(eq=False)
class _Place:
    """Hands the token grid and the timestep to a transformer's blocks, with their own arguments.

    Gradient checkpointing runs a block again, with the same arguments, when other forward passes
    may have come in between: what is not in the arguments would then be another pass's.
    """

    timestep: Tensor | float = 0

    def read_timestep(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.timestep = args[1] if len(args) > 1 else kwargs["timestep"]

    def announce(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        x = args[0] if args else kwargs["hidden_states"]
        own = {_PLACE: (*x.shape[-2:], self.timestep)}
        given = kwargs.get("cross_attention_kwargs") or {}
        return args, kwargs | {"cross_attention_kwargs": given | own}


@dataclass(eq=False)
class _Block:
    """The hooks of one transformer block, and what they share while it runs.

    map: its token map, None where nothing merges in this picture. whole, merged: the block's input
    before and after merging, where all of the block runs on merged tokens.
    """

    index: int
    settings: DiffusionSettings
    map: TokenMap | None = None
    whole: Tensor | None = None
    merged: Tensor | None = None

    def match(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple:
        given = dict(zip(_BLOCK_ARGUMENTS, args, strict=False)) | kwargs
        features = given.pop("hidden_states")
        cross_attention_kwargs = dict(given["cross_attention_kwargs"])
        h, w, timestep = cross_attention_kwargs.pop(_PLACE)
        if cross_attention_kwargs.get("ip_adapter_masks") is not None:
            self._check_masks()
        settings, key = self.settings, None
        batch, _, channels = features.shape
        self.map = None  # A forward that was interrupted may have left one.
        if not settings.why_not(features.device.type, batch, h, w, channels):
            if settings.is_random:
                key = make_key(settings.seed, timestep, self.index).to(features.device)
            self.map = settings.token_map(features, h, w, key)
            if settings.merge_block:
                self.whole, self.merged = features, self.map.merge(features)
                features = self.merged
        return (features,), given | {"cross_attention_kwargs": cross_attention_kwargs}

    def _check_masks(self) -> None:
        # They say for each place of the picture which image it looks at.
        for name in ("merge_block", "merge_crossattn"):
            if getattr(self.settings, name):
                raise ValueError(
                    f"{name} must be False with ip_adapter_masks, got True: masks need every token "
                    "in cross-attention; apply_patch(..., merge_attn=True) merges self-attention"
                )

    def forget(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.map is not None and self.whole is not None and self.merged is not None:
            # Into the unmerged copy, so that no more than the unpatched block's sums is kept.
            output = self.map.unmerge(output - self.merged).add_(self.whole)
        self.map = self.whole = self.merged = None
        return output

    def merge_self_attention(self, attn: Any, args: tuple, kwargs: dict) -> tuple:
        if self.map is None:
            return args, kwargs
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask on self-attention cannot be combined with merged tokens; "
                "remove_patch first, or leave attention_mask=None"
            )
        if self.settings.weighs_keys:
            # [B, 1, M]: the same for every head and query.
            bias = self.map.size.log().transpose(1, 2)
            if not (attn.upcast_attention and type(attn.processor).__name__ in _UPCASTING):
                bias = bias.to(args[0].dtype)
            kwargs = kwargs | {"attention_mask": bias}
        if self.settings.merge_block:
            return args, kwargs
        x, *rest = args
        merged = self.map.merge(x)
        if self.settings.merge_queries:
            return (merged, *rest), kwargs
        return args, kwargs | {"encoder_hidden_states": merged}

    def merge(self, branch: nn.Module, args: tuple, kwargs: dict) -> tuple:
        x, *rest = args
        return (x if self.map is None else self.map.merge(x), *rest), kwargs

    def unmerge(self, branch: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self.map is None else self.map.unmerge(output)


class UNetPatch(Patch):
    """Token merging on one UNet or ControlNet.

    Nothing of the model is touched before `install`; whatever speaks against merging is raised
    when the patch is made.
    """

    def __init__(self, model: Any, settings: DiffusionSettings):
        super().__init__()
        self.settings = settings
        self.model = model
        self.blocks: dict[nn.Module, _Block] = {}
        self.warned = False
        self.transformers = _find_transformers(model, settings)
        if settings.ratio > 0 and all(found.skipped for found in self.transformers):
            reasons = {found.skipped for found in self.transformers} or {"it has no attention"}
            raise ValueError(
                f"nothing would be merged in {type(model).__name__}: {'; '.join(sorted(reasons))}"
            )

    def install(self) -> None:
        if self.settings.ratio == 0:
            return
        place, index = _Place(), 0
        if self.settings.is_random:
            self.before(self.model, place.read_timestep)
        for found in self.transformers:
            self.before(found.module, found.read_grid)
            if found.skipped:
                continue
            self.before(found.module, place.announce)
            for block in found.module.transformer_blocks:
                self._install_block(block, _Block(index, self.settings))
                index += 1
        if self.settings.min_tokens or self.settings.only_where_it_pays:
            self.after(self.model, self._warn_if_idle)

    def _warn_if_idle(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self.warned or torch.compiler.is_compiling():
            return
        reasons = {found.why_not(self.settings) for found in self.transformers}
        if "" not in reasons:
            self.warned = True
            warnings.warn(
                f"nothing merges in {type(model).__name__}: {'; '.join(sorted(reasons))}",
                stacklevel=2,
            )

    def _install_block(self, block: Any, hooks: _Block) -> None:
        settings = self.settings
        self.blocks[block] = hooks
        self.before(block, hooks.match)
        if settings.merge_attn and not block.only_cross_attention:
            self.before(block.attn1, hooks.merge_self_attention)
            if settings.merge_queries and not settings.merge_block:
                self.after(block.attn1, hooks.unmerge)
        if not settings.merge_block:
            branches = [block.attn2] if settings.merge_crossattn and block.attn2 is not None else []
            for branch in branches + [block.ff] * settings.merge_mlp:
                self.before(branch, hooks.merge)
                self.after(branch, hooks.unmerge)
        self.after(block, hooks.forget)

    def rows(self) -> list[Row]:
        rows: dict[tuple[str, str], Row] = {}
        for found in self.transformers:
            row = self._row(found)
            same = rows.get((row.where, row.note))
            blocks = row.blocks + (same.blocks if same else 0)
            rows[row.where, row.note] = row._replace(blocks=blocks)
        return list(rows.values())

    def _row(self, found: _Transformer) -> Row:
        h, w = found.h, found.w
        if not h:
            # A ControlNet does not say for which size it was made.
            size = self.model.config.get("sample_size") or 0
            h, w = (size, size) if isinstance(size, int) else size
            h, w = -(-h // found.downsample), -(-w // found.downsample)
        blocks = getattr(found.module, "transformer_blocks", [])
        tokens = merged = h * w
        work = 1.0
        note = "ratio is 0" if self.settings.ratio == 0 else found.why_not(self.settings)
        if tokens and not note:
            merged = tokens - self.settings.merged(h, w)
            if self.settings.merge_attn and not any(block.only_cross_attention for block in blocks):
                work = (merged / tokens) ** (2 if self.settings.merge_queries else 1)
        where = f"1/{found.downsample} {found.where}"
        return Row(where, len(blocks), tokens, merged, work, note)


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
        _Transformer(where, factor, module, _why_impossible(module, settings))
        for where, factor, block in parts
        for module in getattr(block, "attentions", [])
    ]
    able = [transformer for transformer in found if not transformer.skipped]
    coarsest = min((each.downsample for each in able), default=1) * settings.max_downsample
    for transformer in able:
        if transformer.downsample > coarsest:
            transformer.skipped = f"coarser than max_downsample={settings.max_downsample}"
    return found


def _why_impossible(module: Any, settings: DiffusionSettings) -> str:
    if type(module).__name__ != "Transformer2DModel":
        return f"{type(module).__name__} is not a spatial transformer"
    for block in module.transformer_blocks:
        name = "merge_block" if settings.merge_block else "merge_mlp"
        if getattr(settings, name) and block._chunk_size is not None:
            raise ValueError(
                f"{name} must be False with feed-forward chunking, got True: "
                "set_chunk_feed_forward(None) on the blocks, or leave the MLP unmerged"
            )
        if settings.merge_attn and not settings.merge_queries and block.attn1.fused_projections:
            raise ValueError(
                "merge_queries must be True with fused projections, which know no separate keys, "
                "got False: unfuse_qkv_projections() on the model"
            )
        others = settings.merge_crossattn or settings.merge_mlp or settings.merge_block
        if block.only_cross_attention and not others:
            return "its blocks have no self-attention"
    return ""
