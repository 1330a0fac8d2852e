"""How much work matching, merging and unmerging take, from shapes alone."""

from tomesd.core.workload import Branches, Work

# Operators of tomesd that compute tensors, as a torch dispatch mode counts them.
MATCH_CALLS = 23
REFINE_CALLS = 12
MERGE_CALLS = 5
NORM_CALLS = 6
UNMERGE_CALLS = 1

# The default side of the windows that tokens are matched in, in tokens.
WINDOW = 32


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

    >>> from tomesd.core.workload import flops
    >>> flops(matching(2, 4096, 3072, 256, 2048, 320))
    1006632960

    candidates: destinations that a source is compared with: all, or those of its window.
    destinations: how many there are in all; matters only for refine, the extra k-means rounds.
    """
    scores = batch * sources * candidates
    everything = batch * tokens * channels
    compared = [
        Work("match", 2 * scores * channels, everything + scores, calls=0),
        Work("match", 0, scores, calls=0, traffic="best"),
    ]
    work = [
        # Read for the norms, read and written for the division.
        Work("match", 0, 3 * everything, calls=0),
        Work("match", 0, 2 * everything, calls=0, traffic="rows"),
        *compared * (1 + refine),
        # Sources are added to a copy of the destinations, which is then normalized.
        Work("match", 0, refine * batch * (3 * sources + 5 * destinations) * channels, calls=0),
        # The rest is arithmetic on indices: many operators with little work each.
        Work("match", 0, 0, calls=MATCH_CALLS + refine * REFINE_CALLS),
    ]
    if r < sources:
        work.append(Work("match", 0, batch * sources, calls=0, traffic="topk"))
    return work


def merge(batch: int, tokens: int, r: int, channels: int, *, keep_norm: bool = False) -> list[Work]:
    """The mean of each group: heads and moved tokens are gathered, added and divided.

    >>> from tomesd.core.workload import elements
    >>> elements(merge(1, 4, 2, 8))
    144

    keep_norm: whether means are rescaled to the norms of their heads.
    """
    heads, moved = batch * (tokens - r) * channels, batch * r * channels
    lengths = Work("merge", 0, 2 * heads + moved, calls=NORM_CALLS)
    return [
        *[lengths] * keep_norm,
        Work("merge", 0, 2 * (heads + moved), calls=0, traffic="rows"),
        # Each moved token is added to its head; then the heads are divided.
        Work("merge", 0, 2 * heads + 3 * moved, calls=0),
        Work("merge", 0, 0, calls=MERGE_CALLS),
    ]


def unmerge(batch: int, tokens: int, channels: int) -> list[Work]:
    """Each token gets the value of its group: one gather.

    >>> from tomesd.core.workload import elements
    >>> elements(unmerge(1, 4, 8))
    64
    """
    elements = 2 * batch * tokens * channels
    return [Work("unmerge", 0, elements, calls=UNMERGE_CALLS, traffic="rows")]


def candidates(tokens: int, destinations: int, window: int | None) -> int:
    """How many destinations a source is compared with, in windows of window×window tokens.

    >>> candidates(16384, destinations=4096, window=32)
    256

    window=None: all of them.
    """
    if window is None or window**2 >= tokens:
        return destinations
    return -(-destinations * window**2 // tokens)


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
    """The work of merging r tokens in one block: one match, then merges and unmerges.

    >>> from tomesd.core.workload import flops
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
