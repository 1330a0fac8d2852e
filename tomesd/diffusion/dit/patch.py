"""Token merging in diffusers' transformers, by hooks around whole blocks.

    model pre:  record the token grid and the timestep
    block pre:  one token map from its image tokens: merge them; their positions follow
    attn  pre:  + log(size) on the keys, or
     to_k, to_v post: unmerge keys and values, if the kernel takes no mask
    block post: x + unmerge(block(merge(x)) − merge(x)), and forget the map

So one merge and one unmerge save attention, MLP and projections at once, and the residual stream
stays at full resolution: small differences between merged tokens survive. Text tokens never merge.
What differs between models is in the records of `tomesd.diffusion.dit.spec`.
"""

from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from tomesd.diffusion.attention_bias import check_takes_bias
from tomesd.diffusion.block import Grid, ThreadState
from tomesd.diffusion.conflicts import check_cache, check_guidance, fused_projections_error
from tomesd.diffusion.dit.hooks import BlockHooks
from tomesd.diffusion.dit.model_hooks import ModelHooks
from tomesd.diffusion.dit.spec import Bias, Blocks, DiT, Override, UnmergeKeys
from tomesd.diffusion.dit.video import VideoMatcher
from tomesd.diffusion.processors import KeyProjections, is_stock
from tomesd.diffusion.ratio_plan import LevelRatio, RatioPlan
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.hooks import (
    BlockTrace,
    DenoiserPatch,
    PerThread,
    argument_names,
    unless_removed,
)
from tomesd.reports import ReportRow

_UNWEIGHED = "without proportional attention"


class DiTPatch(DenoiserPatch):
    """Token merging in one diffusion transformer.

    >>> patch = DiTPatch(spec, transformer, DiffusionSettings())
    >>> patch.install()

    pipe: counts the steps, if the ratio changes over them.

    The model is not touched before `install`; whatever prevents merging is raised here.
    """

    def __init__(self, spec: DiT, model: Any, settings: DiffusionSettings, pipe: Any = None):
        super().__init__()
        self.settings = settings
        self.plan = RatioPlan(settings.ratio, pipe)  # type: ignore[arg-type]
        self.matcher = VideoMatcher(settings)
        self.model = model
        self.hooks = ModelHooks(spec, PerThread(ThreadState), argument_names(model))
        self.blocks: dict[nn.Module, BlockHooks] = {}
        if self.plan.names_levels:
            raise TypeError(
                f"ratio must not be given by level for {type(model).__name__}, which has one level"
            )
        if not settings.merge_block:
            raise ValueError(
                f"merge_block must be True for {type(model).__name__}, whose blocks merge as a "
                "whole, got False: leave out merge_attn, merge_crossattn, merge_mlp, "
                "merge_queries, keep_norm and the presets that set them"
            )
        why_not = spec.why_not(model)
        if not why_not and not any(kind.split(model)[0] for kind in spec.lists):
            why_not = "none of its blocks can merge"
        if why_not:
            raise ValueError(f"nothing would be merged in {type(model).__name__}: {why_not}")
        if self.plan.merges:
            self._check_caches()
        if self.matcher.frame.weighs_keys:
            self._check_attention()
        self._find_blocks()

    @property
    def spec(self) -> DiT:
        return self.hooks.spec

    def _check_caches(self) -> None:
        """Raise ValueError if something keeps or perturbs what merges; it may still come later."""
        check_cache(self.model)
        for kind in self.spec.lists:
            for block in kind.split(self.model)[0]:
                check_cache(block, *block.children())
                for attention in kind.attentions(block):
                    check_guidance(attention, merges_queries=True, merges_keys=True)

    def _check_attention(self) -> None:
        """Raise ValueError if some attention cannot weigh its keys."""
        unmerges = any(isinstance(kind.proportional, UnmergeKeys) for kind in self.spec.lists)
        fused = any(getattr(module, "fused_projections", False) for module in self.model.modules())
        if unmerges and fused:
            raise fused_projections_error("prop_attn", True)
        for kind in self.spec.lists:
            if not isinstance(kind.proportional, Bias) or not self.plan.merges:
                continue
            for block in kind.split(self.model)[0]:
                for attention in kind.attentions(block):
                    if is_stock(attention) or not kind.can_unmerge_keys:
                        check_takes_bias(attention)

    def _find_blocks(self) -> None:
        """Make the hooks of the blocks that the model has now; those of the same blocks stay."""
        before, self.blocks = self.blocks, {}
        names = {module: name for name, module in self.model.named_modules()}
        self.names = {block: names[block] for block in self.all_blocks()}
        self.plan.check_blocks(self.names.values())
        for kind in self.spec.lists if self.plan.merges else ():
            for block in kind.split(self.model)[0]:
                self.blocks[block] = before.get(block) or self._hooks_of(block, kind)

    def _hooks_of(self, block: Any, kind: Blocks) -> BlockHooks:
        attentions = kind.attentions(block)
        return BlockHooks(
            len(self.blocks),
            kind,
            self.matcher,
            self.plan.of_level(1, self.names[block]),
            self.hooks,
            kind.names or argument_names(block),
            argument_names(attentions[0]) if attentions else (),
        )

    def install(self) -> None:
        if not self.plan.merges:
            return
        self._find_blocks()
        hooks, spec = self.hooks, self.spec
        if self.plan.changes:
            from tomesd.diffusion.stage_hook import StageHook

            stage = StageHook(hooks.threads, self.plan, hooks.names, spec.timestep)
            self.before(self.model, stage.record)
        if spec.reads_data:
            from tomesd.diffusion.dit.grid_hook import record_grids

            self.before(self.model, record_grids)
        self.before(self.model, self._check_blocks)
        self.before(self.model, hooks.record_place)
        self.after(self.model, hooks.leave, always=True)
        if spec.rope:
            self.after(self.model.get_submodule(spec.rope), hooks.append_place)
        for block, found in self.blocks.items():
            self._install_block(block, found)
        if self.settings.min_tokens or self.settings.only_where_it_pays:
            self.after(self.model, self.warn_if_idle)

    @unless_removed
    def _check_blocks(self, model: Any, args: Any, kwargs: Any) -> None:
        """Raise ValueError if blocks were replaced: new ones could not read what hooks pass on."""
        if torch.compiler.is_compiling():
            return
        for block in self.all_blocks():
            # It may be wrapped, for checkpointing or sharding.
            if block not in self.blocks and self.blocks.keys().isdisjoint(block.children()):
                raise ValueError(
                    f"the blocks of {type(model).__name__} must be those that were patched, got a "
                    f"{type(block).__name__} that was added later: call apply_patch again"
                )

    def _install_block(self, block: Any, hooks: BlockHooks) -> None:
        self.before(block, hooks.merge)
        for attention in hooks.kind.attentions(block):
            can_unmerge = hooks.weighs_keys and hooks.kind.can_unmerge_keys
            self._install_attention(attention, hooks, can_unmerge)
        self.after(block, hooks.finish, always=True)

    def _install_attention(self, attention: Any, hooks: BlockHooks, can_unmerge: bool) -> None:
        how, projections = hooks.kind.proportional, None
        always = isinstance(how, UnmergeKeys)
        if can_unmerge:
            names = how.projections if isinstance(how, UnmergeKeys) else UnmergeKeys().projections
            projections = KeyProjections(self, attention, names, hooks.unmerge_keys)
            if always or not is_stock(attention):
                projections.follow(attention, (), {})
        if isinstance(how, Bias):
            self.before(attention, partial(hooks.weigh_keys, projections))
        elif isinstance(how, Override):
            self.before(attention, hooks.replace_attention)
        elif always and projections is not None:
            self.before(attention, partial(hooks.note_keys, projections))

    def why_idle(self) -> set[str]:
        return {hooks.why_not for hooks in self.blocks.values()}

    def ratio_names(self) -> dict[str, list[nn.Module]]:
        return {self.names[block]: [block] for block in self.blocks}

    def set_ratios(self, ratios: Mapping[str, float]) -> None:
        for block, hooks in self.blocks.items():
            hooks.ratio = LevelRatio([ratios.get(self.names[block], 0.0)])

    def state_of(self, block: nn.Module) -> ThreadState:
        return self.hooks.state

    def all_blocks(self) -> list[nn.Module]:
        return [block for kind in self.spec.lists for block in kind.split(self.model)[0]]

    def traced(self, block: nn.Module) -> BlockTrace | None:
        token_map, place, kind = self.hooks.state.map, self.hooks.place, self.blocks[block].kind
        if token_map is None or place is None:
            return None
        grids = kind.own(place.grids)
        (frames, h, w), *others = grids
        tokens = sum(f * h * w for f, h, w in grids)
        grid: tuple[int, ...] = (h, w) if frames == 1 else (frames, h, w)
        if others:  # Reference images follow the image itself.
            grid = (tokens,)
        prefix = token_map.n - tokens if self.blocks[block].text_first else 0
        return BlockTrace(token_map.group[:, : prefix + tokens], prefix, grid)

    def rows(self) -> list[ReportRow]:
        rows = []
        n = sum(f * h * w for f, h, w in self._grids())
        for kind in self.spec.lists:
            merging, others = kind.split(self.model)
            merging = [block for block in merging if block in self.blocks or not self.plan.merges]
            by_ratio: dict[str, list[Any]] = {}
            for block in merging:
                hooks = self.blocks.get(block)
                by_ratio.setdefault(str(hooks and hooks.ratio), []).append(block)
            rows += [self._row(kind, blocks) for blocks in by_ratio.values()]
            if others:
                note = f"with {kind.unless}: no residual of their input"
                rows.append(ReportRow(kind.name, len(others), n, n, 1.0, note))
        for where, why in self.spec.unmerged:
            rows.append(ReportRow(where, len(attrgetter(where)(self.model)), n, n, 1.0, why))
        return rows

    def _row(self, kind: Blocks, blocks: list[Any]) -> ReportRow:
        grids = kind.own(self._grids())
        n = sum(f * h * w for f, h, w in grids)
        hooks = self.blocks.get(blocks[0])
        if hooks is None or not hooks.ratio.largest:
            return ReportRow(kind.name, len(blocks), n, n, 1.0, "ratio is 0")
        m = n - sum(self.matcher.merged(hooks.ratio.largest, grid) for grid in grids)
        # Before the first image the number of text tokens is unknown.
        estimate = n, m, n**2, m * (n if hooks.unmerges_keys(blocks[0]) else m)
        n, m, before, after = hooks.counts if any(hooks.counts) else estimate
        weighed = kind.proportional is not None or not hooks.weighs_keys
        notes = [hooks.why_not or ("" if weighed else f"{_UNWEIGHED}: its processors take no bias")]
        if hooks.unweighed and not hooks.why_not:
            notes.append(f"{_UNWEIGHED}: {hooks.unweighed}")
        if isinstance(kind.proportional, Bias) and hooks.weighs_keys:
            notes += _notes_of_others(kind, blocks)
        if self.plan.changes:
            notes.append(str(hooks.ratio))
        note = "; ".join(filter(None, notes))
        return ReportRow(kind.name, len(blocks), n, m, after / before if before else 1.0, note)

    def _grids(self) -> tuple[Grid, ...]:
        """Those of the last image, or else of the model's own size, if it has one."""
        if self.hooks.last:
            return self.hooks.last.grids
        config = getattr(self.model, "config", {})
        size, patch = config.get("sample_size"), config.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int):
            return ((1, size // patch, size // patch),)
        return ()


def _notes_of_others(kind: Blocks, blocks: list[Any]) -> list[str]:
    """What becomes of keys beside processors that are not the host's own."""
    attentions = [each for block in blocks for each in kind.attentions(block)]
    names = sorted({type(each.processor).__name__ for each in attentions if not is_stock(each)})
    if kind.can_unmerge_keys:
        return [f"keys unmerged for {name}" for name in names]
    return [f"{name} must add the mask it is given to its logits" for name in names]
