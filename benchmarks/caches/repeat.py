"""A plain cache: in some steps, each block adds again what it added in the last computed one.

It stands for caches as such: it has no thresholds, predictions or model-specific choices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

# Steps of an image that every recipe leaves whole: they lay it out.
FIRST = 0.2


def whole_steps(steps: int) -> int:
    """How many steps come before anything may merge or repeat: a fifth of them, at least one.

    >>> whole_steps(25), whole_steps(4)
    (5, 1)
    """
    return max(1, math.ceil(FIRST * steps - 1e-9))


def spread(steps: int, computed: int) -> tuple[bool, ...]:
    """Which steps are computed: the first fifth, as far as they go, and evenly spread others.

    >>> spread(6, computed=4)
    (True, True, False, True, False, True)
    """
    first = min(whole_steps(steps), computed)
    rest, among = computed - first, steps - first
    chosen = {first - 1 + math.ceil((i + 1) * among / rest) for i in range(rest)} if rest else set()
    return tuple(step < first or step in chosen for step in range(steps))


def every(steps: int, interval: int) -> tuple[bool, ...]:
    """Which steps are computed: the first fifth, then every `interval`-th one.

    >>> every(6, 2)
    (True, True, False, True, False, True)
    """
    first = whole_steps(steps)
    return tuple(i < first or (i - first) % interval == interval - 1 for i in range(steps))


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a UNet or a diffusion transformer.

    >>> len(transformer_blocks(pipe.unet))
    10
    """
    return [
        block
        for name, blocks in model.named_modules()
        if name.rpartition(".")[2] == "transformer_blocks" and isinstance(blocks, nn.ModuleList)
        for block in blocks
    ]


@dataclass(eq=False)
class _Repeat:
    pipe: Any
    computed: Callable[[int], Sequence[bool]]
    step: int = 0
    computes: bool = True
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)

    def count(self, model: nn.Module, args: Any) -> None:
        steps = len(self.pipe.scheduler.timesteps)
        self.computes = self.computed(steps)[self.step % steps]
        self.step += 1

    def call(self, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.computes:
            return x + self.kept[block]
        y: Tensor = block._call_impl(x, *args, **kwargs)
        self.kept[block] = y - x
        return y


@contextmanager
def repeated(
    pipe: Any, model: nn.Module, computed: Callable[[int], Sequence[bool]]
) -> Iterator[None]:
    """Repeat what the blocks added in every step of an image that is not computed.

    >>> with repeated(pipe, pipe.unet, partial(spread, computed=15)):
    ...     image = pipe("a red heart", num_inference_steps=25).images[0]

    pipe: its scheduler says how many steps an image has. computed: from that to one bool for each
    step, the first True.
    Blocks that merge tokens do so in the steps that are computed: what is kept is what was added to
    every token.
    """
    repeat = _Repeat(pipe, computed)
    handle = model.register_forward_pre_hook(repeat.count)
    blocks: list[Any] = transformer_blocks(model)
    for block in blocks:
        # Around all hooks: where Module.compile puts what is called in place of a module.
        block._compiled_call_impl = partial(repeat.call, block)
    try:
        yield
    finally:
        handle.remove()
        for block in blocks:
            block._compiled_call_impl = None
