"""Token merging in diffusers' transformers, by hooks around whole blocks.

    model pre:  note the token grid and the timestep
    block pre:  one token map from its image tokens: merge them; their positions follow
    attn  pre:  + log(size) on the keys, or
     to_k, to_v post: give each token its key and value back, where a kernel gets no mask
    block post: x + unmerge(block(merge(x)) − merge(x)), and forget the map

So one merge and one unmerge save attention, MLP and projections at once, and the residual stream
stays at full resolution: small differences between merged tokens survive. Text tokens never merge.
What a family of models has to say for itself are the records of `diffusers_transformer_family`.
"""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tomesd.diffusion.attention_bias import check_takes_bias
from tomesd.diffusion.dit.hooks import BlockHooks, ModelHooks, Run
from tomesd.diffusion.dit.record import Blocks, Family, Grid
from tomesd.diffusion.dit.video import VideoMatching
from tomesd.diffusion.ratio_schedule import RatioPlan
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.hooks import Patch, Row, Threads


@dataclass(eq=False)
class _Projections:
    """Keeps the hook that gives keys back on the projections that an attention has now.

    A LoRA adapter that is loaded or unloaded puts other modules in their place.
    """

    patch: Patch
    block: BlockHooks
    hooked: dict[str, tuple[nn.Module, RemovableHandle]] = field(default_factory=dict)

    def follow(self, attention: Any, args: tuple, kwargs: dict) -> None:
        if getattr(attention, "fused_projections", False):
            raise ValueError(_FUSED)
        for name in self.block.kind.keys:
            projection = getattr(attention, name)
            before, handle = self.hooked.get(name, (None, None))
            if projection is not before:
                if handle is not None:
                    handle.remove()
                self.patch.after(projection, self.block.give_back)
                self.hooked[name] = projection, self.patch.handles[-1]


class TransformerPatch(Patch):
    """Token merging on one transformer. Nothing of it is touched before `install`."""

    def __init__(
        self,
        family: Family,
        model: Any,
        settings: DiffusionSettings,
        plan: RatioPlan | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.plan = plan or RatioPlan(settings.ratio, None)
        self.model = model
        self.hooks = ModelHooks(family, Threads(Run), _argument_names(model))
        self.stages = tuple(
            VideoMatching(replace(settings, ratio=ratio)) for ratio in self.plan.of_level(1)
        )
        self.blocks: dict[nn.Module, BlockHooks] = {}
        if self.plan.names_levels:
            raise TypeError(
                f"ratio must not be given by level for {type(model).__name__}, which has one level"
            )
        if not settings.merge_block:
            raise ValueError(
                f"merge_block must be True for {type(model).__name__}, whose blocks merge as a "
                "whole, got False: leave out merge_attn, merge_crossattn, merge_mlp, merge_queries "
                "and the presets that set them"
            )
        if not any(kind.split(model)[0] for kind in family.blocks):
            raise ValueError(
                f"nothing would be merged in {type(model).__name__}: it has no blocks that can"
            )
        fused = any(getattr(module, "fused_projections", False) for module in model.modules())
        if fused and settings.weighs_keys and any(kind.keys for kind in family.blocks):
            raise ValueError(_FUSED)
        if settings.ratio > 0 and settings.weighs_keys:
            for attention in self._weighed():
                check_takes_bias(attention)

    def _weighed(self) -> list[Any]:
        """The attention modules that get log(size) on their keys."""
        found = [
            getattr(block, name)
            for kind in self.hooks.family.blocks
            if kind.bias
            for block in kind.split(self.model)[0]
            for name in kind.attention
        ]
        return [attention for attention in found if attention is not None]

    def install(self) -> None:
        if self.settings.ratio == 0:
            return
        if self.plan.changes:
            from tomesd.diffusion.stage_hook import StageHook

            hooks = self.hooks
            stage = StageHook(hooks.threads, self.plan, hooks.names, hooks.family.timestep)
            self.before(self.model, stage.note)
        if self.hooks.family.in_data:
            from tomesd.diffusion.dit.grid_hook import note_grids

            self.before(self.model, note_grids)
        self.before(self.model, self.hooks.note_place)
        if self.hooks.family.rope:
            self.after(self.model.get_submodule(self.hooks.family.rope), self.hooks.append_place)
        for kind in self.hooks.family.blocks:
            for block in kind.split(self.model)[0]:
                self._install_block(block, kind)
        if self.settings.min_tokens or self.settings.only_where_it_pays:
            self.after(self.model, self.warn_if_idle)

    def why_idle(self) -> set[str]:
        return {hooks.why_not for hooks in self.blocks.values()}

    def _install_block(self, block: Any, kind: Blocks) -> None:
        attentions = [getattr(block, name) for name in kind.attention]
        hooks = BlockHooks(
            len(self.blocks),
            kind,
            self.settings,
            self.stages,
            self.hooks,
            _argument_names(block),
            _argument_names(attentions[0]),
        )
        self.blocks[block] = hooks
        self.before(block, hooks.merge)
        for attention in filter(None, attentions):
            if kind.bias:
                self.before(attention, hooks.weigh_keys)
            if hooks.gives_keys_back:
                projections = _Projections(self, hooks)
                projections.follow(attention, (), {})
                self.before(attention, projections.follow)
        self.after(block, hooks.unmerge, always=True)

    def remove(self) -> None:
        super().remove()
        self.blocks.clear()

    def rows(self) -> list[Row]:
        n = sum(f * h * w for f, h, w in self._grids())
        rows = []
        for kind in self.hooks.family.blocks:
            merging, alone = kind.split(self.model)
            if merging:
                rows.append(self._row(kind, merging, n))
            if alone:
                note = f"with {kind.unless}: no residual of their input"
                rows.append(Row(kind.where, len(alone), n, n, 1.0, note))
        for where, why in self.hooks.family.alone:
            rows.append(Row(where, len(getattr(self.model, where)), n, n, 1.0, why))
        return rows

    def _row(self, kind: Blocks, blocks: list[Any], n: int) -> Row:
        if self.settings.ratio == 0:
            return Row(kind.where, len(blocks), n, n, 1.0, "ratio is 0")
        hooks = self.blocks[blocks[0]]
        most = max(self.stages, key=lambda matching: matching.settings.ratio)
        m = n - sum(map(most.merged, self._grids()))
        # Before the first picture the text is not known.
        estimate = n, m, n**2, m * (n if hooks.gives_keys_back else m)
        n, m, before, after = hooks.counts if any(hooks.counts) else estimate
        weighed = kind.bias or kind.keys or not self.settings.weighs_keys
        notes = [hooks.why_not or ("" if weighed else _NO_BIAS)]
        if self.plan.changes:
            notes.append("ratio " + ", ".join(f"{ratio:.2g}" for ratio in self.plan.of_level(1)))
        note = "; ".join(filter(None, notes))
        return Row(kind.where, len(blocks), n, m, after / max(before, 1), note)

    def _grids(self) -> tuple[Grid, ...]:
        """Those of the last picture, or else of the model's own size, where it has one."""
        if self.hooks.last:
            return self.hooks.last.grids
        config = self.model.config
        size, patch = config.get("sample_size"), config.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int):
            return ((1, size // patch, size // patch),)
        return ()


_FUSED = (
    "prop_attn must be False with fused projections, which know no separate keys, got True: "
    "unfuse_qkv_projections() on the model"
)
_NO_BIAS = "without proportional attention: its processors take no bias"


def _argument_names(module: Any) -> tuple[str, ...]:
    """As its class has them: offloading and caches replace a module's own forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
