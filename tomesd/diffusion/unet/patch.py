"""Token merging in diffusers' UNets and ControlNets, by forward hooks alone.

    UNet                  pre:  note the timestep, where the partition is random
    Transformer2DModel    pre:  hand the token grid and the timestep to the blocks
    BasicTransformerBlock pre:  one token map from the block's input features
      attn1 | attn2 | ff  pre:  merge          post: unmerge
    BasicTransformerBlock post: forget the map

Or, with merge_block, the block itself: pre: merge, post: x + unmerge(output − merged). Either way
the residual stream stays at full resolution, so small differences between merged tokens survive.
UNets for video merge in their spatial transformers, each frame by itself; what mixes frames is
left alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.core.partition import make_key
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.attention_bias import check_takes_bias, fit_bias
from tomesd.diffusion.ratio_schedule import RatioPlan
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.levels import FUSED, Run, Transformer, find_transformers
from tomesd.hooks import Patch, Row, Threads, by_name

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

# Attention processors that add the bias to float32 logits where the model says upcast_attention.
_UPCASTING = ("AttnProcessor", "SlicedAttnProcessor")


# What diffusers' hooks are called that give out what a module gave in earlier steps.
_CACHES = {"pyramid_attention_broadcast", "taylorseer_cache"}


@dataclass(eq=False)
class _Block:
    """The hooks of one transformer block."""

    index: int
    settings: DiffusionSettings
    transformer: Transformer

    @property
    def map(self) -> TokenMap | None:
        """The token map of the block that this thread is running; None where nothing merges."""
        return self.transformer.threads.run.map

    def match(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple:
        given = by_name(_BLOCK_ARGUMENTS, args, kwargs)
        place = self.transformer.place(given)
        features = given.pop("hidden_states")
        if (given.get("cross_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
            self._check_masks()
        _check_caches(block, self.settings)
        settings = self.transformer.settings[place.stage]
        run, key = self.transformer.threads.run, None
        batch, _, channels = features.shape
        run.forget_block()  # A forward that the keyboard interrupted may have left something.
        if not settings.why_not(features.device.type, batch, place.h, place.w, channels):
            if settings.is_random:
                key = make_key(settings.seed, place.timestep, self.index).to(features.device)
            run.map = settings.token_map(features, place.h, place.w, key)
            if settings.merge_block:
                run.whole, run.merged = features, run.map.merge(features, how=settings.combine)
                features = run.merged
        return (features,), given

    def _check_masks(self) -> None:
        # They say for each place of the picture which image it looks at.
        for name in ("merge_block", "merge_crossattn"):
            if getattr(self.settings, name):
                raise ValueError(
                    f"{name} must be False with ip_adapter_masks, got True: masks need every token "
                    "in cross-attention; apply_patch(..., merge_attn=True) merges self-attention"
                )

    def forget(self, block: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
        run = self.transformer.threads.run
        token_map, whole, merged = run.map, run.whole, run.merged
        run.forget_block()  # First: gradient checkpointing may end in the middle of what follows.
        # There is no output after an error.
        if output is None or token_map is None or whole is None or merged is None:
            return output
        # Into the unmerged copy, so that no more than the unpatched block's sums is kept.
        return token_map.unmerge(output - merged).add_(whole)

    def merge_self_attention(self, attn: Any, args: tuple, kwargs: dict) -> tuple:
        token_map = self.map
        if token_map is None:
            return args, kwargs
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask on self-attention cannot be combined with merged tokens; "
                "remove_patch first, or leave attention_mask=None"
            )
        if not self.settings.merge_queries and _is_perturbed(attn):
            raise ValueError(
                "merge_queries must be True with perturbed-attention guidance, whose processors "
                "know no separate keys, got False: apply_patch(..., merge_attn=True) or the "
                "defaults merge queries too"
            )
        if not self.settings.merge_queries and attn.fused_projections:
            raise ValueError(FUSED)
        if not self.settings.merge_block:
            x, *rest = args
            merged = token_map.merge(x, how=self.settings.combine)
            if self.settings.merge_queries:
                args = merged, *rest
            else:
                kwargs = kwargs | {"encoder_hidden_states": merged}
        if not self.settings.weighs_keys:
            return args, kwargs
        bias = _log_size(token_map, attn, args[0].dtype)
        return args, kwargs | {"attention_mask": fit_bias(bias, attn, args[0].shape[1])}

    def weigh_keys_beside_objects(self, attn: Any, args: tuple, kwargs: dict) -> tuple:
        """GLIGEN's own attention has objects among its keys, after the picture's tokens."""
        token_map = self.map
        if token_map is None:
            return args, kwargs
        bias = _log_size(token_map, attn, args[0].dtype)
        bias = nn.functional.pad(bias, (0, args[0].shape[1] - bias.shape[2]))
        return args, kwargs | {"attention_mask": fit_bias(bias, attn, args[0].shape[1])}

    def merge(self, branch: nn.Module, args: tuple, kwargs: dict) -> tuple:
        (x, *rest), token_map = args, self.map
        if token_map is not None:
            x = token_map.merge(x, how=self.settings.combine)
        return (x, *rest), kwargs

    def unmerge(self, branch: nn.Module, args: tuple, output: Tensor) -> Tensor:
        token_map = self.map
        return output if token_map is None else token_map.unmerge(output)


class UNetPatch(Patch):
    """Token merging on one UNet or ControlNet.

    Nothing of the model is touched before `install`; whatever speaks against merging is raised
    when the patch is made.
    """

    def __init__(self, model: Any, settings: DiffusionSettings, plan: RatioPlan | None = None):
        super().__init__()
        if settings.across_frames:
            raise ValueError(
                f"across_frames must be False for {type(model).__name__}, whose attention sees one "
                "frame at a time, got True"
            )
        self.settings = settings
        self.plan = plan or RatioPlan(settings.ratio, None)
        self.model = model
        self.blocks: dict[nn.Module, _Block] = {}
        self.threads = Threads(Run)
        self.transformers = find_transformers(model, settings, self.plan, self.threads)
        if settings.ratio > 0 and all(found.skipped for found in self.transformers):
            reasons = {found.skipped for found in self.transformers} or {"it has no attention"}
            raise ValueError(
                f"nothing would be merged in {type(model).__name__}: {'; '.join(sorted(reasons))}"
            )
        for found in self.transformers:
            for block in [] if found.skipped else found.module.transformer_blocks:
                _check_caches(block, settings)
                if settings.merge_attn and settings.weighs_keys and not block.only_cross_attention:
                    check_takes_bias(block.attn1)

    def install(self) -> None:
        if self.settings.ratio == 0:
            return
        if self.settings.is_random:
            self.before(self.model, self._note_timestep)
        if self.plan.changes:
            from tomesd.diffusion.stage_hook import StageHook

            hook = StageHook(self.threads, self.plan, ("sample", "timestep"), "timestep")
            self.before(self.model, hook.note)
        index = 0
        for found in self.transformers:
            self.before(found.module, found.announce)
            for block in [] if found.skipped else found.module.transformer_blocks:
                self._install_block(block, _Block(index, self.settings, found))
                index += 1
        if self.settings.min_tokens or self.settings.only_where_it_pays:
            self.after(self.model, self.warn_if_idle)

    def _note_timestep(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.threads.run.timestep = args[1] if len(args) > 1 else kwargs["timestep"]

    def why_idle(self) -> set[str]:
        return {found.why_not() for found in self.transformers if not found.skipped}

    def _install_block(self, block: Any, hooks: _Block) -> None:
        settings = self.settings
        self.blocks[block] = hooks
        self.before(block, hooks.match)
        if settings.merge_attn and not block.only_cross_attention:
            self.before(block.attn1, hooks.merge_self_attention)
            if settings.merge_queries and not settings.merge_block:
                self.after(block.attn1, hooks.unmerge)
        if settings.merge_block and settings.weighs_keys and hasattr(block, "fuser"):
            self.before(block.fuser.attn, hooks.weigh_keys_beside_objects)
        if not settings.merge_block:
            branches = [block.attn2] if settings.merge_crossattn and block.attn2 is not None else []
            for branch in branches + [block.ff] * settings.merge_mlp:
                self.before(branch, hooks.merge)
                self.after(branch, hooks.unmerge)
        self.after(block, hooks.forget, always=True)

    def rows(self) -> list[Row]:
        rows: dict[tuple[str, str], Row] = {}
        for found in self.transformers:
            row = self._row(found)
            same = rows.get((row.where, row.note))
            blocks = row.blocks + (same.blocks if same else 0)
            rows[row.where, row.note] = row._replace(blocks=blocks)
        return list(rows.values())

    def _row(self, found: Transformer) -> Row:
        h, w = found.h, found.w
        if not h:
            # A ControlNet does not say for which size it was made.
            size = self.model.config.get("sample_size") or 0
            h, w = (size, size) if isinstance(size, int) else size
            h, w = -(-h // found.downsample), -(-w // found.downsample)
        blocks = getattr(found.module, "transformer_blocks", [])
        tokens = merged = h * w
        work = 1.0
        note = found.why_not()
        if tokens and not note:
            merged = tokens - found.most.merged(h, w)
            if self.settings.merge_attn and not any(block.only_cross_attention for block in blocks):
                work = (merged / tokens) ** (2 if self.settings.merge_queries else 1)
        if not note and self.plan.changes:
            note = "ratio " + ", ".join(f"{each.ratio:.2g}" for each in found.settings)
        where = f"1/{found.downsample} {found.where}"
        return Row(where, len(blocks), tokens, merged, work, note)


def _check_caches(block: Any, settings: DiffusionSettings) -> None:
    """What a module gave for merged tokens is of no use in a step that merges others."""
    whole = settings.merge_block
    for name, module, merges in (
        ("block", block, whole),
        ("attn1", block.attn1, whole or (settings.merge_attn and settings.merge_queries)),
        ("attn2", block.attn2, whole or settings.merge_crossattn),
        ("ff", block.ff, whole or settings.merge_mlp),
    ):
        registry = getattr(module, "_diffusers_hook", None)
        caches = _CACHES.intersection(registry.hooks) if merges and registry is not None else None
        if caches:
            raise ValueError(
                f"{name} must not be cached while its tokens merge, got {caches.pop()}: what an "
                "earlier step gave is of other tokens; remove the cache, or merge keys only, "
                'apply_patch(..., preset="quality")'
            )


def _is_perturbed(attn: Any) -> bool:
    return type(attn.processor).__name__.startswith("PAG")


def _log_size(token_map: TokenMap, attn: Any, dtype: torch.dtype) -> Tensor:
    """The bias of each key, [B, 1, M]: the same for every head and query."""
    bias = token_map.size.log().transpose(1, 2)
    name = type(attn.processor).__name__
    if _is_perturbed(attn):
        # The last third of the batch, or half of it without guidance, attends to itself alone.
        attending, of = (2, 3) if name.startswith("PAGCFG") else (1, 2)
        bias = bias[: len(bias) * attending // of]
    return bias if attn.upcast_attention and name in _UPCASTING else bias.to(dtype)
