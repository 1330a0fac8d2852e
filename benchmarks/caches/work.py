"""How much of the transformer blocks' work is done, counted while a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.caches.repeat import transformer_blocks


class BlockWork:
    """Floating-point operations of matrix products and attention in the blocks.

    flops: so far.
    """

    def __init__(self) -> None:
        self.flops = 0

    def linear(self, layer: nn.Linear, args: Any, output: Any) -> None:
        self.flops += 2 * args[0].shape[:-1].numel() * layer.in_features * layer.out_features


@contextmanager
def counted(model: nn.Module) -> Iterator[BlockWork]:
    """Count the work of a UNet's or transformer's blocks inside a `with` block.

    >>> with counted(pipe.unet) as work:
    ...     image = pipe("a red heart").images[0]
    >>> work.flops

    Layers that a cache skips are not called and do not count; nor does what happens outside the
    layers of the blocks, such as matching.
    """
    work, handles = BlockWork(), []
    for block in transformer_blocks(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(work.linear))
        for attention in filter(None, (block.attn1, block.attn2)):
            handles += _count_attention(attention, work)
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def _count_attention(attention: Any, work: BlockWork) -> list[Any]:
    """Two products, of as many queries and keys as the projections were given."""
    queries = 0

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        nonlocal queries
        queries = args[0].shape[1]

    def add(layer: nn.Module, args: Any, output: Any) -> None:
        batch, keys = args[0].shape[:2]
        work.flops += 4 * batch * queries * keys * attention.inner_dim

    return [
        attention.to_q.register_forward_hook(note),
        attention.to_k.register_forward_hook(add),
    ]
