"""Token merging in diffusers' UNets and ControlNets, by forward hooks alone.

    UNet                  pre:  record the timestep, if the partition is random
    Transformer2DModel    pre:  hand the token grid and the timestep to the blocks
    BasicTransformerBlock pre:  one token map from the block's input features
      attn1 | attn2 | ff  pre:  merge          post: unmerge
    BasicTransformerBlock post: forget the map

Or, with merge_block, around the block itself: pre: merge, post: x + unmerge(output − merged).
Either way the residual stream stays at full resolution, so small differences between merged tokens
survive. UNets for video merge in their spatial transformers, each frame separately; temporal layers
see every token.
"""

from typing import Any

from torch import nn

from tomesd.diffusion.attention_bias import check_takes_bias
from tomesd.diffusion.block import ThreadState
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.processors import KeyProjections, is_stock
from tomesd.diffusion.ratio_plan import RatioPlan
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.hooks import BlockHooks, check_caches
from tomesd.diffusion.unet.levels import Transformer, find_transformers
from tomesd.diffusion.unet.spec import UNet
from tomesd.hooks import BlockTrace, DenoiserPatch, PerThread, by_name, unless_removed
from tomesd.reports import ReportRow


class UNetPatch(DenoiserPatch):
    """Token merging in one UNet or ControlNet.

    >>> patch = UNetPatch(UNet(), unet, DiffusionSettings())
    >>> patch.install()

    pipe: counts the steps, if the ratio changes over them. matcher: default: by the settings.

    The model is not touched before `install`; whatever prevents merging is raised here.
    """

    def __init__(
        self,
        spec: UNet,
        model: Any,
        settings: DiffusionSettings,
        pipe: Any = None,
        matcher: Matcher | None = None,
    ):
        super().__init__()
        if settings.across_frames:
            raise ValueError(
                f"across_frames must be False for {type(model).__name__}, whose attention sees one "
                "frame at a time, got True"
            )
        self.spec = spec
        self.settings = settings
        self.matcher = matcher or Matcher(settings)
        self.plan = RatioPlan(settings.ratio, pipe)  # type: ignore[arg-type]
        self.model = model
        self.blocks: dict[nn.Module, BlockHooks] = {}
        self.threads = PerThread(ThreadState)
        self.transformers = find_transformers(model, spec, self.plan, self.matcher, self.threads)
        idle = [found.skipped or found.why_whole() for found in self.transformers]
        if self.plan.merges and all(idle):
            reasons = set(idle) or {"it has no attention"}
            raise ValueError(
                f"nothing would be merged in {type(model).__name__}: {'; '.join(sorted(reasons))}"
            )
        for found in self.transformers:
            for block in found.blocks:
                check_caches(block, settings)
                if self.weighs_keys(block) and is_stock(block.attn1):
                    self.check_weighs_keys(block.attn1)

    def check_weighs_keys(self, attention: Any) -> None:
        """Raise ValueError if log(size) cannot get onto the logits of this attention's keys."""
        check_takes_bias(attention)

    def hooks_of(self, block: Any, found: Transformer) -> BlockHooks:
        return BlockHooks(len(self.blocks), self.matcher, found)

    def weighs_keys(self, block: Any) -> bool:
        weighs = self.settings.merge_attn and self.matcher.weighs_keys
        return weighs and self.spec.has_self_attention(block)

    def install(self) -> None:
        if not self.plan.merges:
            return
        if self.matcher.is_random:
            self.before(self.model, self._record_timestep)
        if self.plan.changes:
            from tomesd.diffusion.stage_hook import StageHook

            names = self.spec.sample, self.spec.timestep
            hook = StageHook(self.threads, self.plan, names, self.spec.timestep)
            self.before(self.model, hook.record)
        for found in self.transformers:
            self.before(found.module, found.announce)
            for block in found.blocks:
                self.install_block(block, self.hooks_of(block, found))
        self.after(self.model, self.warn_if_idle)

    @unless_removed
    def _record_timestep(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = by_name((self.spec.sample, self.spec.timestep), args, kwargs)
        self.threads.state.timestep = given[self.spec.timestep]

    def install_block(self, block: Any, hooks: BlockHooks) -> None:
        settings = self.settings
        self.blocks[block] = hooks
        self.before(block, hooks.match)
        if settings.merge_attn and self.spec.has_self_attention(block):
            self.before(block.attn1, hooks.merge_self_attention)
            self.after(block.attn1, hooks.unmerge_self_attention)
        if self.weighs_keys(block) and hasattr(block.attn1, "to_k"):
            hooks.projections = KeyProjections(
                self, block.attn1, ("to_k", "to_v"), hooks.unmerge_keys
            )
            if not is_stock(block.attn1):
                hooks.projections.follow(block.attn1, (), {})
        if settings.merge_block and self.matcher.weighs_keys and hasattr(block, "fuser"):
            self.before(block.fuser.attn, hooks.weigh_keys_beside_objects)
        if not settings.merge_block:
            branches = [block.attn2] if settings.merge_crossattn and block.attn2 is not None else []
            for branch in branches + [block.ff] * settings.merge_mlp:
                self.before(branch, hooks.merge)
                self.after(branch, hooks.unmerge)
        self.after(block, hooks.finish, always=True)

    def remove(self) -> None:
        super().remove()
        self.blocks.clear()

    def why_idle(self) -> set[str]:
        return {found.why_not() for found in self.transformers if not found.skipped}

    def all_blocks(self) -> list[nn.Module]:
        return [
            block
            for found in self.transformers
            for block in getattr(found.module, "transformer_blocks", [])
        ]

    def traced(self, block: nn.Module) -> BlockTrace | None:
        hooks = self.blocks[block]
        token_map = hooks.map
        return None if token_map is None else BlockTrace(token_map.group, 0, hooks.transformer.grid)

    def rows(self) -> list[ReportRow]:
        rows: dict[tuple[str, str], ReportRow] = {}
        for found in self.transformers:
            row = self.row(found)
            same = rows.get((row.where, row.note))
            blocks = row.blocks + (same.blocks if same else 0)
            rows[row.where, row.note] = row._replace(blocks=blocks)
        return list(rows.values())

    @staticmethod
    def _others(blocks: Any) -> list[str]:
        """The processors of self-attention that are not the host's own."""
        found = [block.attn1 for block in blocks if not is_stock(block.attn1)]
        return sorted({type(attention.processor).__name__ for attention in found})

    def row(self, found: Transformer) -> ReportRow:
        h, w = found.grid
        if not h:
            h, w = self.spec.sample_size(self.model)
            h, w = -(-h // found.downsample), -(-w // found.downsample)
        blocks = getattr(found.module, "transformer_blocks", [])
        tokens = merged = h * w
        work = 1.0
        note = found.why_not()
        if tokens and not note:
            merged = tokens - self.matcher.merged(found.ratio.largest, h, w)
            if self.settings.merge_attn and all(map(self.spec.has_self_attention, blocks)):
                work = (merged / tokens) ** self.merged_sides(blocks)
            others = [] if not self.matcher.weighs_keys else self._others(blocks)
            notes = [str(found.ratio)] * self.plan.changes
            note = "; ".join(notes + [f"keys unmerged for {name}" for name in others])
        where = f"1/{found.downsample} {found.where}"
        return ReportRow(where, len(blocks), tokens, merged, work, note)

    def merged_sides(self, blocks: list[Any]) -> int:
        """How many sides of the attention matrix get shorter: that of the keys, of queries too."""
        unmerged = self.matcher.weighs_keys and bool(self._others(blocks))
        return self.settings.merge_queries + (not unmerged)
