"""How much work merging saves and makes, from shapes alone.

Work is counted in floating-point operations (FLOPs: a multiply-add is two), elements moved and
operators called, and is the same on every device; `tomesd.core.cost` turns it into seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

# Operators of tomesd itself that compute tensors, as a torch dispatch mode counts them.
MATCH_CALLS = 23
REFINE_CALLS = 12
MERGE_CALLS = 5
NORM_CALLS = 6
UNMERGE_CALLS = 1

# Stable Diffusion's prompts: CLIP's 77 tokens.
TEXT_TOKENS = 77

# The side of the windows in which tokens look for their best match, in tokens.
WINDOW = 32


class Work(NamedTuple):
    """One operation, or several of a kind.

    part: what it belongs to, "attention", "linear", "other", "match", "merge" or "unmerge".
    flops: of matrix products and attention, as torch.utils.flop_counter counts them; what is done
        to single numbers is bound by memory and counted there.
    elements: numbers read and written, weights included. calls: operators.
    arithmetic, traffic: which of a device's `Rates` they run at.
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

    merge_block: all of them, norms and residuals too, between one merge and one unmerge.
    """

    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    merge_queries: bool = True
    merge_block: bool = False


def attention(batch: int, queries: int, keys: int, channels: int) -> Work:
    """Fused attention of all heads together: no score leaves the chip.

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
    """A block's self-attention with its four projections; fewer keys where only these merge.

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
    """A block's attention to the text, with its four projections.

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
    """A block's MLP: GEGLU to four times the channels, and back.

    >>> flops(feed_forward(2, 4096, 320))
    20132659200
    """
    wide = 4 * channels
    # gelu(gate) reads and writes it once; the product reads two and writes one.
    gate = Work("other", 0, 5 * batch * tokens * wide, calls=2)
    return [
        linear(batch, tokens, channels, 2 * wide),
        gate,
        linear(batch, tokens, wide, channels),
    ]


def matching(
    batch: int,
    tokens: int,
    sources: int,
    candidates: int,
    r: int,
    channels: int,
    destinations: int = 0,
    refine: int = 0,
) -> list[Work]:
    """Bipartite soft matching: each source against its candidates, then the r best edges.

    >>> flops(matching(2, 4096, 3072, 256, 2048, 320))
    1006632960

    candidates: destinations that a source is compared with: all, or those of its window.
    destinations: how many there are in all; counts where sources are compared again, refine times,
        with what merged into them.
    """
    scores = batch * sources * candidates
    everything = batch * tokens * channels
    compared = [
        Work("match", 2 * scores * channels, everything + scores, calls=0),
        Work("match", 0, scores, calls=0, traffic="best"),
    ]
    work = [
        # Read for the norm, read and written for the division.
        Work("match", 0, 3 * everything, calls=0),
        Work("match", 0, 2 * everything, calls=0, traffic="rows"),
        *compared * (1 + refine),
        # Sources are read and added to a copy of the destinations, which is then normalized.
        Work("match", 0, refine * batch * (3 * sources + 5 * destinations) * channels, calls=0),
        # What is left is arithmetic on indices: many operators with little to do.
        Work("match", 0, 0, calls=MATCH_CALLS + refine * REFINE_CALLS),
    ]
    if r < sources:
        work.append(Work("match", 0, batch * sources, calls=0, traffic="topk"))
    return work


def merge(batch: int, tokens: int, r: int, channels: int, *, keep_norm: bool = False) -> list[Work]:
    """The mean of each group: heads and moved tokens are gathered, added, and divided.

    >>> elements(merge(1, 4, 2, 8))
    144

    keep_norm: whether the mean is made as long as the head, for which all norms are taken.
    """
    heads, moved = batch * (tokens - r) * channels, batch * r * channels
    lengths = Work("merge", 0, 2 * heads + moved, calls=NORM_CALLS)
    return [
        *[lengths] * keep_norm,
        Work("merge", 0, 2 * (heads + moved), calls=0, traffic="rows"),
        # Each moved token is read and added to its head, and what the heads then are is divided.
        Work("merge", 0, 2 * heads + 3 * moved, calls=0),
        Work("merge", 0, 0, calls=MERGE_CALLS),
    ]


def unmerge(batch: int, tokens: int, channels: int) -> list[Work]:
    """The value of its group for each token: one gather.

    >>> elements(unmerge(1, 4, 8))
    64
    """
    elements = 2 * batch * tokens * channels
    return [Work("unmerge", 0, elements, calls=UNMERGE_CALLS, traffic="rows")]


def candidates(tokens: int, destinations: int, window: int | None) -> int:
    """How many destinations a source is compared with in windows of window×window tokens.

    >>> candidates(16384, destinations=4096, window=32)
    256

    None compares it with all of them.
    """
    if window is None or window**2 >= tokens:
        return destinations
    return -(-destinations * window**2 // tokens)


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

    The patch's own work is not in it: see `patch`.
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
    """A block of SD3 or Flux: text tokens go through it with the image's, and never merge.

    >>> flops(joint_block(1, 4096, 1536, text_tokens=333))
    371304683520

    A block of Flux that computes attention and MLP side by side takes the same FLOPs.
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


def patch(
    batch: int,
    tokens: int,
    channels: int,
    r: int,
    *,
    branches: Branches | None = None,
    destinations: int | None = None,
    window: int | None = WINDOW,
    refine: int = 0,
    keep_norm: bool = True,
) -> list[Work]:
    """What merging r tokens in one block takes: one matching, and merges and unmerges.

    >>> flops(patch(2, 4096, 320, r=2048))
    1006632960

    The arguments are those of `tomesd.core.cost.balance`.
    """
    branches = branches or Branches()
    if destinations is None:
        destinations = min(-(-tokens // 4), tokens - r)
    near = candidates(tokens, destinations, window)
    sources = tokens - destinations
    work = matching(batch, tokens, sources, near, r, channels, destinations, refine)
    keep_norm = keep_norm and not branches.merge_block
    inward = merge(batch, tokens, r, channels, keep_norm=keep_norm)
    outward = unmerge(batch, tokens, channels)
    if branches.merge_block:
        # x + unmerge(f(merge(x)) − merge(x)): a difference of merged tokens, a sum of all.
        rest = 3 * batch * (2 * tokens - r) * channels
        return [*work, *inward, *outward, Work("unmerge", 0, rest, calls=2)]
    if branches.merge_attn:
        work += inward + outward * branches.merge_queries
    return work + (inward + outward) * (branches.merge_crossattn + branches.merge_mlp)


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
