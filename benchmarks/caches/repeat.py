"""A plain cache: in some of the steps, each block adds again what it added in the last computed one.

It stands for caches as such: it has no thresholds, predictions or model-specific choices.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
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

    >>> spread(6, 4)
    (True, True, False, True, False, True)
    """
    first = min(whole_steps(steps), computed)
    rest, among = computed - first, steps - first
    chosen = {first - 1 + math.ceil((i + 1) * among / rest) for i in range(rest)} if rest else set()
    return tuple(step < first or step in chosen for step in range(steps))


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
    computed: Sequence[bool]
    step: int = -1
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)

    def count(self, model: nn.Module, args: Any) -> None:
        self.step = (self.step + 1) % len(self.computed)

    def call(self, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.computed[self.step]:
            return x + self.kept[block]
        y: Tensor = block._call_impl(x, *args, **kwargs)
        self.kept[block] = y - x
        return y


@contextmanager
def repeated(model: nn.Module, computed: Sequence[bool]) -> Iterator[None]:
    """Repeat what the blocks added in every step of an image that is not computed.

    >>> with repeated(pipe.unet, spread(steps=25, computed=15)):
    ...     image = pipe("a red heart", num_inference_steps=25).images[0]

    computed: one for each call of the model in one image, the first True.
    Blocks that merge tokens do so in the steps that are computed: what is kept is what was added to
    every token.
    """
    repeat = _Repeat(computed)
    handle = model.register_forward_pre_hook(repeat.count)
    blocks = transformer_blocks(model)
    for block in blocks:
        # Around all hooks: where Module.compile puts what it calls instead of a module.
        block._compiled_call_impl = lambda *args, block=block, **kwargs: repeat.call(  # type: ignore
            block, *args, **kwargs
        )
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()
        for block in blocks:
            block._compiled_call_impl = None
