"""Which forward of a Vision Transformer a block is in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd.hooks import PerThread
from tomesd.vit.forward import Forward, direct_call_error


@dataclass(eq=False)
class ThreadState:
    """What one thread is doing in one model.

    begun: its latest forward; None in a thread of autograd's own, which begins none. current: the
    forward that its block is in, which in a backward pass may be another. features: of that block.
    called: whether the model has been called, and its blocks not yet. collected: whether the blocks
    run outside of the model's own forward, so that somebody may keep their outputs. block: the one
    that it is in, −1 for none. inputs: all tokens of the blocks that merge within themselves.
    lengths: of the pictures that the call packs into one sequence, until its blocks take them.
    """

    begun: Forward | None = None
    current: Forward | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    called: bool = False
    collected: bool = False
    block: int = -1
    inputs: dict[int, Tensor] = field(default_factory=dict)
    lengths: Sequence[int] | None = None


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
        compiling = torch.compiler.is_compiling()
        if layer == 0 or (not compiling and _in_backward()):
            self.begin()
        elif not compiling:
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
