"""How much work the blocks of a model do, with and without merged tokens, from shapes alone.

Work is counted in floating-point operations (FLOPs: a multiply-add is two), elements moved and
operators called. It is the same on every device; `tomesd.core.cost` turns it into seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

# Stable Diffusion's prompts: CLIP's 77 tokens.
TEXT_TOKENS = 77

# Operators that compute tensors in a diffusers block, as a torch dispatch mode counts them: of
# BasicTransformerBlock and of JointTransformerBlock.
OPERATORS, JOINT_OPERATORS = 28, 57


class Work(NamedTuple):
    """One operation, or several of a kind.

    part: what it is part of: "attention", "linear", "other", "match", "merge" or "unmerge".
    flops: of matrix products and attention, as torch.utils.flop_counter counts them; element-wise
        operations are bound by memory and counted as traffic.
    elements: numbers read and written, weights included. calls: operators called.
    arithmetic, traffic: which of a device's `Rates` apply.
    """

    part: str
    flops: int
    elements: int
    calls: int = 1
    arithmetic: str = "matmul"
    traffic: str = "memory"


@dataclass(frozen=True)
class Branches:
    """Which branches of a block run on merged tokens, by `DiffusionSettings`' names.

    merge_block: all of them, with norms and residuals, between one merge and one unmerge.
    """

    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    merge_queries: bool = True
    merge_block: bool = False


def attention(batch: int, queries: int, keys: int, channels: int) -> Work:
    """Fused attention of all heads: no score is written to memory.

    >>> attention(2, 4096, 4096, 320).flops
    42949672960
    """
    flops = 4 * batch * queries * keys * channels
    return Work("attention", flops, 2 * batch * (queries + keys) * channels, 1, "attention")


def linear(batch: int, tokens: int, inputs: int, outputs: int) -> Work:
    """A linear layer.

    >>> linear(2, 4096, 320, 320).flops
    1677721600
    """
    rows = batch * tokens
    elements = rows * (inputs + outputs) + inputs * outputs
    return Work("linear", 2 * rows * inputs * outputs, elements)


def self_attention(batch: int, queries: int, keys: int, channels: int) -> list[Work]:
    """Self-attention with its four projections; fewer keys than queries where only keys merge.

    >>> flops(self_attention(2, 4096, 4096, 320))
    49660559360
    """
    return [
        linear(batch, queries, channels, channels),
        *[linear(batch, keys, channels, channels)] * 2,
        attention(batch, queries, keys, channels),
        linear(batch, queries, channels, channels),
    ]


def cross_attention(
    batch: int, tokens: int, channels: int, text_tokens: int, text_channels: int
) -> list[Work]:
    """Cross-attention to the text, with its four projections.

    >>> flops(cross_attention(2, 4096, 320, 77, 768))
    4314234880
    """
    return [
        linear(batch, tokens, channels, channels),
        *[linear(batch, text_tokens, text_channels, channels)] * 2,
        attention(batch, tokens, text_tokens, channels),
        linear(batch, tokens, channels, channels),
    ]


def feed_forward(batch: int, tokens: int, channels: int) -> list[Work]:
    """The MLP: GEGLU to four times the channels, and back.

    >>> flops(feed_forward(2, 4096, 320))
    20132659200
    """
    wide = 4 * channels
    # gelu reads and writes one tensor; the product reads two and writes one.
    gate = Work("other", 0, 5 * batch * tokens * wide, calls=2)
    return [
        linear(batch, tokens, channels, 2 * wide),
        gate,
        linear(batch, tokens, wide, channels),
    ]


def block(
    batch: int,
    tokens: int,
    channels: int,
    *,
    r: int = 0,
    branches: Branches | None = None,
    text_tokens: int = TEXT_TOKENS,
    text_channels: int = 768,
) -> list[Work]:
    """A diffusers BasicTransformerBlock, with r tokens fewer in its merged branches.

    >>> flops(block(2, 4096, 320)) - flops(block(2, 4096, 320, r=2048))
    35567697920

    The work of merging itself is not included: see `tomesd.core.merging_work`.
    """
    branches = branches or Branches()
    m, whole = tokens - r, branches.merge_block
    keys = m if whole or branches.merge_attn else tokens
    queries = keys if whole or branches.merge_queries else tokens
    crossing = m if whole or branches.merge_crossattn else tokens
    feeding = m if whole or branches.merge_mlp else tokens
    around = batch * channels * (m if whole else tokens)
    return [
        *self_attention(batch, queries, keys, channels),
        *cross_attention(batch, crossing, channels, text_tokens, text_channels),
        *feed_forward(batch, feeding, channels),
        *[Work("other", 0, 2 * around), Work("other", 0, 3 * around)] * 3,  # norms and residuals
    ]


def joint_block(
    batch: int,
    tokens: int,
    channels: int,
    *,
    r: int = 0,
    branches: Branches | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> list[Work]:
    """A block of SD3 or Flux: text tokens pass through it too and never merge.

    >>> flops(joint_block(1, 4096, 1536, text_tokens=333))
    371304683520

    A block of Flux that computes attention and MLP in parallel takes the same FLOPs.
    """
    branches = branches or Branches()
    m, whole = tokens - r, branches.merge_block
    keys = m if whole or branches.merge_attn else tokens
    queries = keys if whole or branches.merge_queries else tokens
    feeding = m if whole or branches.merge_mlp else tokens
    work = [attention(batch, queries + text_tokens, keys + text_tokens, channels)]
    for asking, asked, fed, through in (
        (queries, keys, feeding, m if whole else tokens),
        (text_tokens, text_tokens, text_tokens, text_tokens),
    ):
        around = batch * channels * through
        work += [
            *[linear(batch, asking, channels, channels)] * 2,
            *[linear(batch, asked, channels, channels)] * 2,
            linear(batch, fed, channels, 4 * channels),
            Work("other", 0, 8 * batch * fed * channels),
            linear(batch, fed, 4 * channels, channels),
            *[Work("other", 0, 2 * around), Work("other", 0, 3 * around)] * 2,
        ]
    return work


def flops(work: Iterable[Work]) -> int:
    """All floating-point operations.

    >>> flops([linear(1, 2, 3, 4)] * 2)
    96
    """
    return sum(each.flops for each in work)


def elements(work: Iterable[Work]) -> int:
    """All numbers read and written; times `Rates.itemsize` they are bytes.

    >>> elements([linear(1, 2, 3, 4)] * 2)
    52
    """
    return sum(each.elements for each in work)
