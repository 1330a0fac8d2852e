"""How much work matching, merging and unmerging take, from shapes alone."""

from typing import NamedTuple

from tomesd.core.workload import Branches, Work


class Launches(NamedTuple):
    """How many calls each step takes: on a GPU, kernels that are launched.

    match: of a match, and refine of each extra k-means round. merge: of a merge, and norms where
    norms are kept, besides. unmerge: of an unmerge, and residual around whole blocks, besides.
    """

    match: int
    refine: int
    merge: int
    norms: int
    unmerge: int
    residual: int


# Operators that compute tensors, as a torch dispatch mode counts them.
PYTORCH = Launches(match=23, refine=12, merge=5, norms=6, unmerge=1, residual=2)
# The kernels of `tomesd.kernels`, which leave matching with k-means rounds to PyTorch.
FUSED = Launches(match=5, refine=0, merge=1, norms=0, unmerge=1, residual=0)

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
    fused: bool = False,
) -> list[Work]:
    """Bipartite soft matching: each source against its candidates, then the r best edges.

    >>> from tomesd.core.workload import flops
    >>> flops(matching(2, 4096, 3072, 256, 2048, 320))
    1006632960

    candidates: destinations that a source is compared with: all, or those of its window.
    destinations: how many there are in all; matters only for refine, the extra k-means rounds.
    fused: whether kernels match, which write no scores.
    """
    fused = fused and not refine
    launches = FUSED if fused else PYTORCH
    scores = batch * sources * candidates
    everything = batch * tokens * channels
    if fused:
        return [
            # Sources and destinations are read once, norms and maxima are taken on the way.
            Work("match", 2 * scores * channels, 0, calls=0),
            Work("match", 0, everything, calls=0, traffic="rows"),
            # Once for each of a radix select's digits and for what is on the edge.
            Work("match", 0, 5 * batch * sources, calls=0),
            Work("match", 0, 0, calls=launches.match),
        ]
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
        Work("match", 0, 0, calls=launches.match + refine * launches.refine),
    ]
    if r < sources:
        work.append(Work("match", 0, batch * sources, calls=0, traffic="topk"))
    return work


def merge(
    batch: int,
    tokens: int,
    r: int,
    channels: int,
    *,
    keep_norm: bool = False,
    fused: bool = False,
) -> list[Work]:
    """The mean of each group: heads and moved tokens are gathered, added and divided.

    >>> from tomesd.core.workload import elements
    >>> elements(merge(1, 4, 2, 8))
    144

    keep_norm: whether means are rescaled to the norms of their heads.
    fused: whether a kernel merges, which reads each token once and writes each head once.
    """
    heads, moved = batch * (tokens - r) * channels, batch * r * channels
    launches = FUSED if fused else PYTORCH
    lengths = Work("merge", 0, 2 * heads + moved, calls=launches.norms)
    if fused:
        return [
            *[lengths] * keep_norm,
            Work("merge", 0, 2 * heads + moved, calls=launches.merge, traffic="rows"),
        ]
    return [
        *[lengths] * keep_norm,
        Work("merge", 0, 2 * (heads + moved), calls=0, traffic="rows"),
        # Each moved token is added to its head; then the heads are divided.
        Work("merge", 0, 2 * heads + 3 * moved, calls=0),
        Work("merge", 0, 0, calls=launches.merge),
    ]


def unmerge(batch: int, tokens: int, channels: int) -> list[Work]:
    """Each token gets the value of its group: one gather.

    >>> from tomesd.core.workload import elements
    >>> elements(unmerge(1, 4, 8))
    64
    """
    elements = 2 * batch * tokens * channels
    return [Work("unmerge", 0, elements, calls=PYTORCH.unmerge, traffic="rows")]


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
    fused: bool = False,
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
    work = matching(batch, tokens, sources, near, r, channels, destinations, refine, fused)
    keep_norm = keep_norm and not branches.merge_block
    inward = merge(batch, tokens, r, channels, keep_norm=keep_norm, fused=fused)
    outward = unmerge(batch, tokens, channels)
    if branches.merge_block:
        # x + unmerge(f(merge(x)) − merge(x)): a difference of merged tokens, a sum of all.
        calls = (FUSED if fused else PYTORCH).residual
        # A kernel reads the merged tokens too, and x.
        rest = batch * channels * ((tokens - r) + tokens if fused else 3 * (2 * tokens - r))
        return [*work, *inward, *outward, Work("unmerge", 0, rest, calls=calls)]
    if branches.merge_attn:
        work += inward + outward * branches.merge_queries
    return work + (inward + outward) * (branches.merge_crossattn + branches.merge_mlp)
