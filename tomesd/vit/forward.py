"""The token maps of one forward of a Vision Transformer, and which forward a block is in."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.core.token_map import TokenMap
from tomesd.hooks import PerThread
from tomesd.vit import schedule
from tomesd.vit.matcher import Matcher
from tomesd.vit.settings import ViTSettings


@dataclass(eq=False)
class Forward:
    """The token maps of one forward.

    maps[i] maps the first block's tokens to those that block i gets, maps[-1] to those after the
    last block; steps[i] is what block i merges, None for nothing. Where blocks merge within
    themselves, maps[i] is what block i merges, and there is nothing else. They are kept by block,
    so that gradient checkpointing, which runs blocks again in any order, finds them. collected: whether
    another caller than the model's own forward runs the blocks, and may keep what each of them
    gives.
    """

    settings: ViTSettings
    matcher: Matcher
    prefix: int
    schedule: list[int]
    maps: list[TokenMap] = field(init=False)
    steps: list[TokenMap | None] = field(init=False)
    masks_tokens: bool = False
    collected: bool = False

    def __post_init__(self) -> None:
        self.maps = [None] * (len(self.schedule) + 1)  # type: ignore[list-item]
        self.steps = [None] * len(self.schedule)

    def key_bias(self, layer: int, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to add to the attention logits of a block's keys: [B, N] in x's dtype, or None.

        x: [B, N, C], the block's tokens. mask: the host's own, on the first block's tokens. A
        masked
        token counts for nothing wherever it merges: it has size zero.
        """
        if layer == 0 and not self.settings.within_blocks:
            self.maps[0] = self._weighed(TokenMap.identity(x), x, mask)
        so_far = self.maps[layer]
        if so_far is None or so_far.size.shape[:2] != x.shape[:2]:
            raise direct_call_error(layer, x)
        if not self.masks_tokens and (not self.settings.prop_attn or so_far.m == so_far.n):
            return None
        size = so_far.size.squeeze(-1)
        if not self.settings.prop_attn:
            size = (size > 0).to(size.dtype)
        return size.log().to(x.dtype)

    def _weighed(self, token_map: TokenMap, x: Tensor, mask: Tensor | None) -> TokenMap:
        """The map of a block's tokens x, [B, N, C], where tokens that a mask hides have no size."""
        self.masks_tokens = mask is not None
        if mask is None:
            return token_map
        size = _visible(mask, x).to(token_map.size.dtype)[..., None]
        return replace(token_map, size=token_map.merge(size, how="sum"))

    def merge_within(self, layer: int, x: Tensor, mask: Tensor | None, keep: int = 1) -> Tensor:
        """Merge the tokens [B, N, C] that a block gets, for this block alone.

        keep: the number of tokens that are left must be a multiple of it.
        """
        n = x.shape[1]
        r = schedule.clipped(self.schedule[layer], n, self.prefix)
        r -= (r - n) % keep
        self.maps[layer] = None  # type: ignore[call-overload]
        if r <= 0:
            return x
        features = dict.fromkeys(self.matcher.needs, x.detach()[:, :, None])
        step = self.matcher.token_map(features, self.prefix, r, layer, len(self.steps))
        self.maps[layer] = self._weighed(step, x, mask)
        visible = torch.ones_like(x[..., :1], dtype=torch.float32)
        if mask is not None:
            visible = _visible(mask, x).to(torch.float32)[..., None]
        return self.matcher.merge(step, x, visible)

    def match(self, layer: int, features: dict[str, Tensor], n: int) -> None:
        """Decide what a block of n tokens merges."""
        r = schedule.clipped(self.schedule[layer], n, self.prefix)
        step = None
        if r > 0:
            layers = len(self.steps)
            step = self.matcher.token_map(features, self.prefix, r, layer, layers)
        before = self.maps[layer]
        self.steps[layer] = step
        self.maps[layer + 1] = before if step is None else before.then(step)

    def merge(self, layer: int, x: Tensor) -> Tensor:
        step = self.steps[layer]
        return x if step is None else self.matcher.merge(step, x, self.maps[layer].size)

    def all_tokens(self, layer: int, x: Tensor) -> Tensor:
        """x: what goes into a block, or comes out of the last; merged, or all tokens already."""
        so_far = self.maps[layer]
        return so_far.unmerge(x) if so_far.m < so_far.n and x.shape[1] == so_far.m else x

    def merged_tokens(self, layer: int, x: Tensor, how: str) -> Tensor:
        """The inverse of `all_tokens`. how: as in `TokenMap.merge`."""
        so_far = self.maps[layer]
        if so_far is None or so_far.m == so_far.n or x.shape[1] != so_far.n:
            return x
        return so_far.merge(x, how=how)


def direct_call_error(layer: int, x: Tensor) -> RuntimeError:
    """What to raise in a block that did not get what the block before it returned."""
    return RuntimeError(
        f"block {layer} of a patched Vision Transformer must be called by its model, with what "
        f"block {layer - 1} returned, got a tensor of shape {tuple(x.shape)} from elsewhere; "
        "remove_patch to call single blocks"
    )


@dataclass(eq=False)
class ThreadState:
    """What one thread is doing in one model.

    begun: its latest forward; None in a thread of autograd's own, which begins none. current: the
    forward that its block is in, which in a backward pass may be another. features: of that block.
    called: whether the model has been called, and its blocks not yet. collected: whether the blocks
    run outside of the model's own forward, so that somebody may keep their outputs. block: the one
    that it is in, −1 for none. inputs: all tokens of the blocks that merge within themselves.
    """

    begun: Forward | None = None
    current: Forward | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    called: bool = False
    collected: bool = False
    block: int = -1
    inputs: dict[int, Tensor] = field(default_factory=dict)


class Forwards:
    """Which forward a block is in: its thread's latest, or an earlier one that is recomputed.

    A forward is known by the input of the block: checkpointing passes the same tensor again (but
    not re-entrant checkpointing, nor inside a compiled graph: there it is the latest). The first
    block needs no such memory, since it starts from all tokens; its input, which may be a caller's
    own tensor in any number of forwards, is never recorded.

    make: makes a new forward. latest: the one that any thread began last.
    """

    def __init__(self, make: Callable[[], Forward]):
        self.make = make
        self.forget()

    def forget(self) -> None:
        self.threads = PerThread(ThreadState)
        self.latest = self.make()
        self.of_inputs = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of a model leave out what its forwards left behind.
        return Forwards, (self.make,)

    @property
    def thread(self) -> ThreadState:
        return self.threads.state

    @property
    def begun(self) -> Forward:
        """This thread's latest forward, or the one whose backward pass it runs."""
        return self.latest if self.thread.begun is None else self.thread.begun

    @property
    def current(self) -> Forward:
        """The forward that this thread's block is in."""
        if torch.compiler.is_compiling() or self.thread.current is None:
            return self.begun
        return self.thread.current

    def call(self, *_: Any) -> None:
        """The model's own forward is about to run its blocks."""
        self.thread.called = True

    def end(self, *_: Any) -> None:
        """The model's own forward is over, whether it ran its blocks or not."""
        self.thread.called = False

    def begin(self) -> None:
        thread = self.thread
        thread.current = self.make()
        thread.current.collected = thread.collected
        if torch.compiler.is_compiling() or not _in_backward():
            thread.begun = self.latest = thread.current

    def arrive(self, layer: int, x: Tensor) -> Tensor:
        """x: what a block is called with. Returns it with the tokens merged so far."""
        thread = self.thread
        thread.block = layer
        if layer == 0:
            thread.collected, thread.called = not thread.called, False
            self.begin()
            return x
        if torch.compiler.is_compiling():
            return self.begun.merged_tokens(layer, x, "mean")
        forward = self._forward_of(layer, x)
        # Equal tokens are merged bit for bit, but another hook may have changed each of them.
        merged = forward.merged_tokens(layer, x, "head" if x in self.of_inputs else "mean")
        if merged is not x:
            self.of_inputs[merged] = forward
        return merged

    def within(self, layer: int) -> Forward:
        """The forward of a block that merges within itself, and that nothing else depends on."""
        if layer == 0 or _in_backward():
            self.begin()
        elif not torch.compiler.is_compiling():
            self.thread.current = self.begun
        return self.current

    def enter_within(self, x: Tensor) -> None:
        """As `enter`, in a block that merges within itself."""
        if not torch.compiler.is_compiling():
            self.thread.current = self.of_inputs.get(x, self.thread.current)

    def enter(self, layer: int, x: Tensor) -> None:
        """x: what the first module inside a block gets. Checkpointing may run that again alone."""
        if torch.compiler.is_compiling():
            return
        if self.thread.block != layer and not _in_backward():
            raise direct_call_error(layer, x)
        if layer == 0:
            self.begin()
            return
        self.thread.current = self._forward_of(layer, x)

    def _forward_of(self, layer: int, x: Tensor) -> Forward:
        found: Forward | None = self.of_inputs.get(x)
        if found is None:
            # Another hook made x from what the block before returned.
            found = self.begun
            if found.maps[layer + 1] is not None and not _in_backward():
                raise direct_call_error(layer, x)
        return found

    def record(self, x: Tensor) -> Tensor:
        """x: what a block gives to the next."""
        self.thread.block = -1
        if not torch.compiler.is_compiling():
            self.of_inputs[x] = self.current
        return x


def _in_backward() -> bool:
    """Whether autograd runs this, so that a block that runs is recomputed."""
    return torch._C._current_graph_task_id() != -1


def _visible(mask: Tensor, x: Tensor) -> Tensor:
    """Which tokens a host's attention mask leaves visible: bool [B, N].

    mask: broadcastable to [B, heads, N, N], True or 0 for a visible key, else False or very
    negative. Raises ValueError unless it is the same for every query and head: merged tokens are
    one query.
    """
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    # A compiled graph cannot read the data.
    if not torch.compiler.is_compiling():
        varies = (seen != seen[:, :1, :1]).any()
        weighs = mask.dtype != torch.bool and mask.masked_fill(~seen, 0).any()
        if varies or weighs:
            raise ValueError(
                "attention_mask must hide the same tokens from all queries and heads where tokens "
                f"merge, and do nothing else, got one of shape {tuple(mask.shape)}; remove_patch "
                "first"
            )
    return seen[:, 0, 0].expand(x.shape[:2])
