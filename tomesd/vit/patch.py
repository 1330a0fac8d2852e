"""Token merging in Vision Transformers, by forward hooks alone: what all families share.

    model                 pre:  a new run begins
    block's input         pre:  which run is this? (where it is the feature) note it
    attention             pre:  + log(size) on the keys
    key projection        post: note the keys
    second norm           pre:  one token map from the keys; merge
    MLP                   post: unmerge
    block                 post: merge; after the last block unmerge to where it all began

"Sandwich": the host adds the MLP's output to tokens that it has kept for itself, which a hook does
not see. So the MLP runs on merged tokens, its output is unmerged, and the sum is merged:
merge(x + unmerge(mlp(merge(x)))) == merge(x) + mlp(merge(x)), which is merging between attention
and MLP. A family's file says where these places are in its host's blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.core.token_map import TokenMap
from tomesd.hooks import Patch, Row, Threads
from tomesd.vit import schedule
from tomesd.vit.schedule import Cost
from tomesd.vit.settings import ViTSettings


class Seams(NamedTuple):
    """Where the hooks of one transformer block go.

    enter: the first module that gets the block's input. merge: the first after attention, unmerge:
    the last before its output is added to the residual stream. features: whose outputs are q, k and
    v. width: channels of all heads together.
    """

    block: nn.Module
    enter: nn.Module
    attention: nn.Module
    merge: nn.Module
    unmerge: nn.Module
    features: dict[str, nn.Module]
    width: int


@dataclass(eq=False)
class Run:
    """The token maps of one forward.

    maps[i] leads from the first block's tokens to those that block i gets, maps[-1] to those after
    the last block; steps[i] is what block i merges, None for nothing. They are kept by block, so
    that gradient checkpointing, which runs blocks again in any order, finds what it needs.
    """

    settings: ViTSettings
    prefix: int
    schedule: list[int]
    maps: list[TokenMap] = field(init=False)
    steps: list[TokenMap | None] = field(init=False)
    hides_tokens: bool = False

    def __post_init__(self) -> None:
        self.maps = [None] * (len(self.schedule) + 1)  # type: ignore[list-item]
        self.steps = [None] * len(self.schedule)

    def key_bias(self, layer: int, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to add to the attention logits of a block's keys: [B, N] in x's dtype, or None.

        x: [B, N, C], the block's tokens. mask: the host's own, on the first block's tokens. A token
        that it hides counts for nothing wherever it merges: it is a group of size zero.
        """
        if layer == 0:
            none = torch.empty(x.shape[0], 0, dtype=torch.long, device=x.device)
            identity = TokenMap.from_moves(x.shape[1], none, none)
            self.hides_tokens = mask is not None
            if mask is not None:
                size = _visible(mask, x).to(identity.size.dtype)[..., None]
                identity = replace(identity, size=size)
            self.maps[0] = identity
        so_far = self.maps[layer]
        if so_far is None or so_far.size.shape[:2] != x.shape[:2]:
            raise alone(layer, x)
        if not self.hides_tokens and (not self.settings.prop_attn or so_far.m == so_far.n):
            return None
        size = so_far.size.squeeze(-1)
        if not self.settings.prop_attn:
            size = (size > 0).to(size.dtype)
        return size.log().to(x.dtype)

    def match(self, layer: int, features: dict[str, Tensor], n: int) -> None:
        """Decide what a block of n tokens merges."""
        r = schedule.clipped(self.schedule[layer], n, self.prefix)
        step = None
        if r > 0:
            step = self.settings.token_map(features, self.prefix, r, layer, len(self.steps))
        before = self.maps[layer]
        self.steps[layer] = step
        self.maps[layer + 1] = before if step is None else before.then(step)

    def merge(self, layer: int, x: Tensor) -> Tensor:
        step = self.steps[layer]
        if step is None:
            return x
        if self.settings.combine != "weighted":
            return step.merge(x, how=self.settings.combine)
        # Groups of hidden tokens alone have no weight at all, and need one to be averaged.
        return step.merge(x, weight=self.maps[layer].size.clamp(min=1e-6))


def alone(layer: int, x: Tensor) -> RuntimeError:
    """What a block is told that did not get what the one before it gave."""
    return RuntimeError(
        f"block {layer} of a patched Vision Transformer must be called by its model, with what "
        f"block {layer - 1} gave, got a tensor of shape {tuple(x.shape)} from elsewhere; "
        "remove_patch to call blocks by themselves"
    )


@dataclass(eq=False)
class _Here:
    """What one thread is doing in one model.

    begun: the run of its latest forward; None in a thread of autograd's own, which begins none.
    run: the one that its block is in, which in backward may be another. features: of that block.
    """

    begun: Run | None = None
    run: Run | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


class Runs:
    """Which run a block is in: its thread's latest, or one that checkpointing goes back to.

    That goes with its input: what runs again gets the same tensor again. (But not from re-entrant
    checkpointing, nor inside of a compiled graph: there it is the latest.) The first block needs no
    such memory, since it starts from all tokens: its input, which may be a caller's own tensor in
    any number of forwards, is never noted.

    make: makes a new run. latest: the one that any thread began last.
    """

    def __init__(self, make: Callable[[], Run]):
        self.make = make
        self.forget()

    def forget(self) -> None:
        self.threads = Threads(_Here)
        self.latest = self.make()
        self.of_inputs = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple:
        # Copies and pickles of a model are without what its forwards left.
        return Runs, (self.make,)

    @property
    def here(self) -> _Here:
        return self.threads.run

    @property
    def begun(self) -> Run:
        """The run of this thread's latest forward, or of the one that it goes back through."""
        return self.latest if self.here.begun is None else self.here.begun

    @property
    def current(self) -> Run:
        """The run that this thread's block is in."""
        if torch.compiler.is_compiling() or self.here.run is None:
            return self.begun
        return self.here.run

    def begin(self, *_: Any) -> None:
        here = self.here
        here.run = self.make()
        if torch.compiler.is_compiling() or not _in_backward():
            here.begun = self.latest = here.run

    def enter(self, layer: int, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if layer == 0:
            self.begin()  # Hosts offer their blocks under other names than forward, too.
            return
        run = self.of_inputs.get(x)
        if run is None:
            # Someone else's hook made it of what the block before gave.
            run = self.begun
            if run.maps[layer + 1] is not None and not _in_backward():
                raise alone(layer, x)
        self.here.run = run

    def note(self, x: Tensor) -> Tensor:
        """x: what a block gives to the next."""
        if not torch.compiler.is_compiling():
            self.of_inputs[x] = self.current
        return x


def _in_backward() -> bool:
    """Whether autograd runs this, so that a block that runs is one that runs again."""
    return torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class Layer:
    """The hooks of one block."""

    index: int
    runs: Runs
    attention: Any

    @property
    def run(self) -> Run:
        return self.runs.current

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.runs.enter(self.index, args[0])
        if "x_pre" in self.run.settings.needs:
            self.note("x_pre", args[0][:, :, None])

    def note(self, name: str, feature: Tensor) -> None:
        """feature: [B, N, H, D]. No gradient flows through the matching."""
        self.runs.here.features[name] = feature.detach()

    def merge(self, norm: nn.Module, args: tuple, kwargs: dict) -> tuple:
        x, *rest = args
        if "x" in self.run.settings.needs:
            self.note("x", x[:, :, None])
        here = self.runs.here
        self.run.match(self.index, here.features, x.shape[1])
        here.features = {}
        return (self.run.merge(self.index, x), *rest), kwargs

    def unmerge(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor:
        step = self.run.steps[self.index]
        return output if step is None else step.unmerge(output)

    def leave(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.finish(self.run.merge(self.index, output))

    def finish(self, merged: Tensor) -> Tensor:
        run = self.run
        last = self.index == len(run.schedule) - 1
        if last:
            return run.maps[-1].unmerge(merged) if run.settings.unmerge else merged
        return self.runs.note(merged)

    def note_q(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.note("q", self.by_heads("q", output))

    def note_k(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.note("k", self.by_heads("k", output))

    def note_v(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.note("v", self.by_heads("v", output))

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        """What a module of `Seams.features` gave, as [B, N, H, D]."""
        raise NotImplementedError

    def weigh_keys(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Hand key_bias to the attention as its host takes it."""
        raise NotImplementedError


class ViTPatch(Patch):
    """Token merging on one Vision Transformer.

    Nothing of the model is touched before `install`; whatever speaks against merging is raised
    when the patch is made.
    """

    layer_type: type[Layer]

    def __init__(self, model: Any, settings: ViTSettings):
        super().__init__()
        self.model = model
        self.settings = settings
        self.seams = self.find_seams()
        self.prefix = self.count_prefix()
        self.own_tokens = self.count_tokens()
        r = settings.r
        if settings.speedup is not None:
            r = schedule.for_speedup(
                settings.speedup, self.cost(), len(self.seams), self.own_tokens, self.prefix
            )
        per_layer = schedule.per_layer(r, len(self.seams))
        self.runs = Runs(partial(Run, settings, self.prefix, per_layer))

    @property
    def run(self) -> Run:
        """The run that this thread is in, or was in last."""
        return self.runs.current

    def find_seams(self) -> list[Seams]:
        raise NotImplementedError

    def count_prefix(self) -> int:
        """How many class, distillation and register tokens lead the sequence."""
        raise NotImplementedError

    def count_tokens(self) -> int:
        """How many tokens, prefix and all, an input of the model's own size has."""
        raise NotImplementedError

    def install(self) -> None:
        if not any(self.run.schedule):
            return
        self.before(self.model, self.runs.begin)
        for index, seams in enumerate(self.seams):
            layer = self.layer_type(index, self.runs, seams.attention)
            self.before(seams.enter, layer.enter)
            for name in self.settings.needs:
                if name in seams.features:
                    self.after(seams.features[name], getattr(layer, f"note_{name}"))
            self.install_block(seams, layer)

    def install_block(self, seams: Seams, layer: Layer) -> None:
        self.before(seams.attention, layer.weigh_keys)
        self.before(seams.merge, layer.merge)
        self.after(seams.unmerge, layer.unmerge)
        self.leave(seams.block, layer.leave)

    def leave(self, block: nn.Module, hook) -> None:
        # First of all hooks: what others collect, such as hidden states, is what the next block
        # gets, whoever came first.
        self.handles.append(block.register_forward_hook(hook, prepend=True))

    def remove(self) -> None:
        super().remove()
        self.runs.forget()

    def rows(self) -> list[Row]:
        seen = self.runs.latest.maps[0]
        first = tokens = self.own_tokens if seen is None else seen.n
        rows = []
        for index, r in enumerate(self.run.schedule):
            merges = schedule.clipped(r, tokens, self.prefix)
            note = f"r clipped from {r} to {merges}" if merges < r else ""
            work = (tokens / first) ** 2
            tokens -= merges
            rows.append(Row(f"layer {index}", 1, first, tokens, work, note))
        return rows

    def whole_attention(self, seams: Seams) -> nn.Module:
        """All of a block's attention, with its output projection."""
        return seams.attention

    def cost(self) -> Cost:
        """Multiply-adds of a block: its weight matrices, once per token, and attention itself."""
        seams = self.seams[0]
        attention = _matrices(self.whole_attention(seams))
        mlp = _matrices(seams.block) - attention
        return Cost(attention, 2 * seams.width, mlp)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


def _visible(mask: Tensor, x: Tensor) -> Tensor:
    """Which tokens a host's attention mask lets be seen: bool [B, N].

    mask: broadcastable to [B, heads, N, N], True or 0 where a query may look, else False or very
    negative. Raises ValueError if it is not the same for every query and head: merged tokens are
    one query.
    """
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    # A compiled graph cannot look at the data.
    if not torch.compiler.is_compiling():
        varies = (seen != seen[:, :1, :1]).any()
        weighs = mask.dtype != torch.bool and mask.masked_fill(~seen, 0).any()
        if varies or weighs:
            raise ValueError(
                "attention_mask must hide the same tokens from all queries and heads where tokens "
                f"merge, and nothing else, got one of shape {tuple(mask.shape)}; remove_patch first"
            )
    return seen[:, 0, 0].expand(x.shape[:2])
