"""Where a UNet merges: its spatial transformers, their levels, and the token grid of each."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tomesd.core.rows import fixed
from tomesd.diffusion.block import Place, ThreadState, pop_place
from tomesd.diffusion.conflicts import check_guidance
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.processors import is_stock, why_whole
from tomesd.diffusion.ratio_plan import LevelRatio, RatioPlan
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.spec import UNet
from tomesd.hooks import PerThread


@dataclass(eq=False)
class Transformer:
    """One spatial transformer of a UNet, which knows the token grid; its blocks see a flat list.

    name: of this module in the model.
    model_threads: the state of threads in the whole model. width: the channels of its tokens; 0
    where nothing merges. carrier: the argument in which the place travels to the blocks, or "".
    finest: whether it is at the finest level that can merge.
    skipped: why nothing merges here, or "". last: batch, height and width of its tokens and the
    device in the last forward pass of any thread; zeros before the first. last_place: the same for
    a block that autograd calls again in a thread of its own. beside: patches of other
    extensions in its blocks, which leave only self-attention to merge. threads: the state of
    threads in this transformer.
    """

    model_threads: PerThread[ThreadState]
    where: str
    name: str
    downsample: int
    module: Any
    width: int
    carrier: str
    matcher: Matcher
    ratio: LevelRatio
    finest: bool
    skipped: str = ""
    last: tuple[int, int, int, torch.device] = (0, 0, 0, torch.device("cpu"))
    last_place: Place | None = None
    beside: tuple[str, ...] = ()
    threads: PerThread[ThreadState] = field(default_factory=lambda: PerThread(ThreadState))

    @property
    def blocks(self) -> list[Any]:
        """The blocks that merge."""
        return [] if self.skipped else list(self.module.transformer_blocks)

    @property
    def grid(self) -> tuple[int, int]:
        return self.last[1:3]

    def why_not(self) -> str:
        """Why nothing merges here in an image like the last one; empty if something does."""
        batch, h, w, device = self.last
        if self.skipped or not h:
            return self.skipped or self.why_whole()
        shape = batch, h, w, self.width
        why_not = self.matcher.why_not(self.ratio.largest, device, *shape, finest=self.finest)
        return why_not or self.why_whole()

    def why_whole(self) -> str:
        """Why none of its blocks merge, for who computes their attention; empty if one does."""
        settings = self.matcher.settings
        reasons = [why_block_whole(block, settings) for block in self.blocks]
        return reasons[0] if all(reasons) and reasons else ""

    def announce(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """Hand the place to the blocks."""
        x = args[0] if args else kwargs["hidden_states"]
        h, w = fixed(x.shape[-2]), fixed(x.shape[-1])
        self.last = x.shape[0], h, w, x.device
        if self.skipped:
            return None
        settings = self.matcher.settings
        if settings.merge_attn and not self.why_not():
            for block in self.module.transformer_blocks:
                check_guidance(block.attn1, settings.merge_queries, merges_keys=True)
        model = self.model_threads.state
        place = Place(((1, h, w),), model.timestep, model.stage)
        if not self.carrier:
            self.threads.state.place = self.last_place = place
            return None
        return args, kwargs | {self.carrier: place.add_to(kwargs.get(self.carrier))}

    def place(self, given: dict[str, Any]) -> Place:
        """The place of a block with these arguments, which are then as the host made them."""
        if self.carrier:
            found = pop_place(given, self.carrier)
            if found is None:
                raise ValueError(
                    f"{self.carrier} of a block in {self.where} must hold the token grid, which "
                    "the model puts there: call the model, or remove_patch to call single blocks"
                )
            return found
        place = self.threads.state.place or self.last_place
        tokens = given["hidden_states"].shape[1]
        if place is None or tokens != place.grids[0][1] * place.grids[0][2]:
            raise ValueError(
                f"hidden_states of a block in {self.where} must be of the last forward pass, at "
                f"{place}, got {tokens} tokens: with gradient checkpointing, call backward before "
                "the model runs at another size"
            )
        return place


def why_block_whole(block: Any, settings: DiffusionSettings) -> str:
    """Why a block does not merge, for who computes its attention; empty if it may."""
    if not getattr(block, "only_cross_attention", False):
        keys_only = not settings.merge_queries
        return why_whole(block.attn1, keys_only) if settings.merge_attn else ""
    others = [attn for attn in (block.attn1, block.attn2) if not is_stock(attn)]
    if not settings.merge_block or not others:
        return ""
    name = type(others[0].processor).__name__
    return f"{name} may need all tokens in cross-attention, and there is no self-attention"


def find_transformers(
    model: Any,
    spec: UNet,
    plan: RatioPlan,
    matcher: Matcher,
    threads: PerThread[ThreadState],
) -> list[Transformer]:
    """All spatial transformers of a UNet or ControlNet, including those where nothing merges.

    Raises ValueError for settings that their blocks cannot follow, and levels that do not exist.
    """
    settings = matcher.settings
    modules = [
        (where, factor, module, _why_impossible(module, spec, settings))
        for where, factor, attentions in spec.stages(model)
        for module in attentions
    ]
    able = sorted({factor for _, factor, _, why_not in modules if not why_not})
    plan.check_levels([factor // able[0] for factor in able])
    names = {module: name for name, module in model.named_modules()}
    plan.check_blocks(names[module] for _, _, module, why_not in modules if not why_not)
    found = []
    for where, factor, module, why_not in modules:
        # Levels are counted from the finest one with attention that merges: also on SDXL, whose
        # first level has none.
        level = factor // able[0] if able else 1
        ratio = plan.of_level(level, names[module])
        if not why_not and not plan.names_places and level > settings.max_downsample:
            why_not = f"coarser than max_downsample={settings.max_downsample}"
        if not why_not and not ratio.largest:
            why_not = "ratio is 0"
        carrier = spec.transformers.get(type(module).__name__, "")
        width = 0 if why_not else spec.width(module)
        found.append(
            Transformer(
                model_threads=threads,
                where=where,
                name=names[module],
                downsample=factor,
                module=module,
                width=width,
                carrier=carrier,
                matcher=matcher,
                ratio=ratio,
                finest=level == 1,
                skipped=why_not,
            )
        )
    return found


def _why_impossible(module: Any, spec: UNet, settings: DiffusionSettings) -> str:
    name = type(module).__name__
    if name == "Attention":
        return (
            "its attention has no transformer around it, and is too small a share of its work for "
            "merging to pay (docs/performance.md)"
        )
    if name not in spec.transformers:
        return f"{name} is none of the transformers that its class is known to have"
    for block in module.transformer_blocks:
        spec.check_block(block, settings)
        others = settings.merge_crossattn or settings.merge_mlp or settings.merge_block
        if not spec.has_self_attention(block) and not others:
            return "its blocks have no self-attention"
    return ""
