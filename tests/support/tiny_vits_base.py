"""What all tiny Vision Transformers of the tests have in common."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.vit_reference import Block

WIDTH, DEPTH, HEADS = 24, 3, 2


@dataclass
class Vit:
    """A model, an input for it, and what the tests need to know about it.

    blocks, reference: its transformer blocks, and what they compute, for vit_reference. prefix: its
    class, distillation and register tokens. suffix: tokens at the end that never merge.
    """

    model: Any
    inputs: dict[str, Tensor]
    blocks: list[nn.Module]
    reference: list[Block]
    prefix: int
    suffix: int = 0

    def output(self) -> Tensor:
        out = self.model(**self.inputs)
        out = out if isinstance(out, Tensor) else out[0]
        return torch.stack(out) if isinstance(out, tuple) else out  # A backbone's feature maps.


def images(size: int = 24) -> Tensor:
    return torch.randn(2, 3, size, size)


def heads(x: Tensor) -> Tensor:
    """[N, C] as [heads, N, C / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)


def tokens_of(output: Any) -> Tensor:
    """What a block gives: its tokens, or a tuple that starts with them."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens
