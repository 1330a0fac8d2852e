"""Token merging in Vision Transformers, by forward hooks alone: what all hosts share.

    model                 pre:  its own forward, and not another caller, runs the blocks
    block                 pre:  a new forward begins; if it is given all tokens, merge
    block's input         pre:  which forward is this?
    attention             pre:  + log(size) on the keys
    key projection        post: record the keys
    second norm           pre:  one token map from the keys; merge
    MLP                   post: unmerge
    block                 post: merge; after the last block, and where somebody may keep the output,
                                unmerge to the tokens of the first

With within_blocks=True, and where the next block needs the token grid:

    block                 pre:  one token map from its input; merge
    attention             pre:  + log(size) on the keys
    block                 post: x + unmerge(block(merge(x)) − merge(x))

The host adds the MLP's output to tokens that it has kept for itself, which a hook does not see. So
the MLP runs on merged tokens, its output is unmerged, and the sum is merged: merge(x +
unmerge(mlp(merge(x)))) == merge(x) + mlp(merge(x)), which is merging between attention and MLP. The
spec of a host says where these places are in its blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tomesd.core.token_map import TokenMap
from tomesd.hooks import Patch, argument_names
from tomesd.reports import ReportRow
from tomesd.vit import schedule
from tomesd.vit.forward import Forward
from tomesd.vit.forwards import Forwards
from tomesd.vit.matcher import Matcher
from tomesd.vit.schedule import Cost
from tomesd.vit.settings import ViTSettings
from tomesd.vit.spec import ViT


class ViTPatch(Patch):
    """Token merging in one Vision Transformer.

    >>> patch = ViTPatch(spec, vit, ViTSettings(r=8))
    >>> patch.install()

    matcher: default: the paper's.

    The model is not touched before `install`; whatever prevents merging is raised here.
    """

    def __init__(
        self,
        spec: ViT,
        model: Any,
        settings: ViTSettings,
        pipe: Any = None,
        matcher: Matcher | None = None,
    ):
        super().__init__()
        if spec.check:
            spec.check(model, settings)
        self.spec = spec
        self.model = model
        self.settings = settings
        self.matcher = matcher or Matcher(settings.order)
        blocks = spec.find_blocks(model)
        self.points = [spec.hook_points(index, block) for index, block in enumerate(blocks)]
        self.seen = self._modules()
        self.prefix = spec.prefix(model)
        suffix = spec.suffix(model) if spec.suffix else 0
        self.protected = self.prefix + suffix
        self.own_tokens = spec.tokens(model)
        r = settings.r
        if settings.speedup is not None:
            r = schedule.for_speedup(
                settings.speedup,
                self.cost(),
                len(self.points),
                self.own_tokens,
                self.protected,
                settings.within_blocks,
            )
        per_layer = schedule.per_layer(r, len(self.points))
        if spec.only:
            per_layer = [r * spec.only(block) for r, block in zip(per_layer, blocks, strict=True)]
        make = partial(Forward, settings, self.matcher, self.prefix, suffix, per_layer)
        self.forwards = Forwards(make)

    @property
    def forward(self) -> Forward:
        """The forward that this thread is in, or was in last."""
        return self.forwards.current

    def install(self) -> None:
        if not any(self.forward.schedule):
            return
        if not (self.spec.changes and self.spec.changes(self.model)):
            self.before(self.model, self._call)
            self.after(self.model, self.forwards.end, always=True)
        # A Sequential runs its blocks and keeps nothing; other methods of the model run them singly
        # to collect what they give.
        blocks = self.spec.find_blocks(self.model)
        if isinstance(blocks, nn.Sequential):
            self.before(blocks, self.forwards.call)
        for index, points in enumerate(self.points):
            names = argument_names(points.attention)
            layer = self.spec.layer(
                index,
                self.forwards,
                points.attention,
                names,
                self.spec.attention_mask,
                self.spec.rotary,
            )
            layer.install(self, points)
        if self.spec.recorder and self.settings.unmerge and not self.settings.within_blocks:
            self.first_after(self.spec.recorder(self.model), self._unmerge_hidden_states)

    def _modules(self) -> list[int]:
        """Which modules are hooked now; it changes where one is replaced."""
        return [
            id(module)
            for block in self.spec.find_blocks(self.model)
            for module in self.spec.modules(block)
        ]

    def _check(self) -> None:
        """Follow modules that were replaced since, and refuse what cannot be followed.

        Raises TypeError for a block in which tokens cannot merge, and for ToMe's old `model.r = 8`;
        whatever apply_patch raises.
        """
        model, settings = self.model, self.settings
        if "r" in model.__dict__:
            raise TypeError(
                f"r must be set by apply_patch(model, r={model.r!r}), got model.r = {model.r!r}, "
                "which has no effect: delete it"
            )
        if self._modules() != self.seen:
            fresh = type(self)(self.spec, model, settings, matcher=self.matcher)
            self.remove()
            self.__dict__.update(fresh.__dict__)
            self.install()
        elif self.spec.check:
            self.spec.check(model, settings)

    def _call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._check()
        blocks = self.spec.find_blocks(model)
        if not isinstance(blocks, nn.Sequential) or getattr(model, "grad_checkpointing", False):
            self.forwards.call()

    def first_after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call the hook after the module's forward, before all other hooks: what they collect, such
        as hidden states, is then what the next block gets."""
        self.handles.append(module.register_forward_hook(hook, prepend=True))

    def remove(self) -> None:
        super().remove()
        self.forwards.forget()

    def rows(self) -> list[ReportRow]:
        seen = next(filter(None, self.forwards.latest.maps), None)
        first = tokens = self.own_tokens if seen is None else seen.n
        rows = []
        for index, r in enumerate(self.forward.schedule):
            merges = schedule.clipped(r, tokens, self.protected)
            note = f"r clipped from {r} to {merges}" if merges < r else ""
            # Each of several pictures in one sequence merges for itself.
            after = index if self.settings.within_blocks else index + 1
            merged = self.forwards.latest.maps[after]
            left = tokens - merges if merged is None else merged.m
            if self.spec.only and not r:
                note = "the next block needs the token grid"
            work = ((left if self.settings.within_blocks else tokens) / first) ** 2
            rows.append(ReportRow(f"layer {index}", 1, first, left, work, note))
            if not self.settings.within_blocks:
                tokens = left
        return rows

    def traced(self) -> dict[int, TokenMap]:
        """What the latest forward of this thread merged, by layer."""
        maps = self.forward.maps
        if self.settings.within_blocks:
            return {index: merged for index, merged in enumerate(maps) if merged is not None}
        return dict(enumerate(maps[1:]))

    def cost(self) -> Cost:
        """Multiply-adds of a block: its weight matrices, once per token, and attention itself."""
        points = self.points[0]
        attention = self.spec.layer.whole_attention(points)
        projections = _matrices(attention)
        mlp = _matrices(points.block) - projections
        return Cost(projections, 2 * self.spec.layer.width(points), mlp)

    def _unmerge_hidden_states(
        self, recorder: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        if isinstance(output, tuple):
            return tuple(
                self._all_tokens(part) if isinstance(part, tuple) else part for part in output
            )
        if output.hidden_states is not None:
            output["hidden_states"] = self._all_tokens(output.hidden_states)
        return output

    def _all_tokens(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """states: the inputs of the blocks and the last output, which is unmerged already; None for
        those that the caller skips. Anything else (attentions) stays as it is."""
        forward = self.forward
        last = len(forward.maps) - 1
        if len(states) <= last:
            return states
        into = enumerate(states[:last])
        return (*(None if x is None else forward.all_tokens(i, x) for i, x in into), *states[last:])


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
