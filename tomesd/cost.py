"""What token merging saves and what it costs, from shapes alone: work first, then seconds.

Work is counted in floating-point operations (FLOPs: a multiply-add is two), elements moved and
operators called, and is the same everywhere. Seconds are an estimate: each operation takes as long
as the slowest of its arithmetic, its traffic and its calls at the rates of a device. Nothing is
ever timed here, so a model behaves the same in every run. See docs/performance.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    matmul, attention: FLOPs per second of matrix products and of fused attention.
    memory: bytes per second, read and written, of what goes through memory in order.
    rows: the same of rows that are read or written by an index, as merging and unmerging do.
    best, topk: bytes per second of similarities, looking for the best of each row and for the
        largest r of all.
    call: seconds that an operator takes however small it is.
    itemsize: bytes of a number in the precision that these rates are for.
    """

    matmul: float
    attention: float
    memory: float
    rows: float
    best: float
    topk: float
    call: float
    itemsize: int


# Measured: one thread of an AMD EPYC (Zen 4, AVX-512), torch 2.15, fp32, the best of 20 interleaved
# rounds, rounded. matmul: Linear 8192×320→320 and →2560, 2048×640→5120: 77 to 100 GFLOP/s.
# attention: scaled_dot_product_attention, batch 2, 8 heads, 4,096 tokens of 320 channels: 72.
# memory: x + x, 8192×320: 67 GB/s. rows: index_select of 8,192 rows of 320: 15. best: max(-1) of
# 2×2048×1024: 4.4. topk: two thirds of 2×12288, 0.097 G numbers a second. call: the operators of
# one match, merge and unmerge of 16 tokens, with cold caches as inside of a model: 16 to 34 µs.
CPU = Rates(
    matmul=90e9,
    attention=72e9,
    memory=60e9,
    rows=15e9,
    best=4.4e9,
    topk=0.39e9,
    call=16e-6,
    itemsize=4,
)

# Published, not measured: the peaks of an RTX 4090 in half precision, 165.2 TFLOP/s of its tensor
# cores with sums in fp32 and 1,008 GB/s (NVIDIA, "Ada GPU Architecture", appendix A). Real kernels
# stay below the peaks, which understates what merging saves. call: launching a kernel takes 4 to
# 6 µs (measured by others on an RTX 5070 Ti: susun-blog.com/blog/pegainfer-3-cuda-graph).
CUDA = Rates(
    matmul=165.2e12,
    attention=165.2e12,
    memory=1008e9,
    rows=1008e9,
    best=1008e9,
    topk=1008e9,
    call=5e-6,
    itemsize=2,
)

# Operators of tomesd itself that are no views, as a torch dispatch mode counts them.
MATCH_CALLS = 34
MERGE_CALLS = 12
UNMERGE_CALLS = 3

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

    def seconds(self, rates: Rates) -> float:
        return max(
            self.flops / getattr(rates, self.arithmetic),
            self.elements * rates.itemsize / getattr(rates, self.traffic),
            self.calls * rates.call,
        )


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


class Balance(NamedTuple):
    """Seconds that merging saves in one block, and seconds that it spends on that."""

    saved: float
    spent: float


def rates(device_kind: str) -> Rates:
    """The rates of a kind of device.

    >>> rates("cpu").itemsize
    4

    device_kind: torch.device's type. For one that is neither "cpu" nor "cuda" the rates are those
        of "cuda": fast arithmetic and dear calls make merging pay last of all.
    Raises TypeError if it is not a string.
    """
    if not isinstance(device_kind, str):
        raise TypeError(f'device_kind must be a string such as "cuda", got {device_kind!r}')
    return CPU if device_kind == "cpu" else CUDA


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
    batch: int, tokens: int, sources: int, candidates: int, r: int, channels: int
) -> list[Work]:
    """Bipartite soft matching: each source against its candidates, then the r best edges.

    >>> flops(matching(2, 4096, 3072, 256, 2048, 320))
    1006632960

    candidates: destinations that a source is compared with: all, or those of its window.
    """
    scores = batch * sources * candidates
    everything = batch * tokens * channels
    work = [
        # Read for the norm, read and written for the division.
        Work("match", 0, 3 * everything, calls=0),
        Work("match", 0, 2 * everything, calls=0, traffic="rows"),
        Work("match", 2 * scores * channels, everything + scores, calls=0),
        Work("match", 0, scores, calls=0, traffic="best"),
        # What is left is arithmetic on indices: many operators with little to do.
        Work("match", 0, 0, calls=MATCH_CALLS),
    ]
    if r < sources:
        work.append(Work("match", 0, batch * sources, calls=0, traffic="topk"))
    return work


def merge(batch: int, tokens: int, r: int, channels: int) -> list[Work]:
    """The mean of each group: heads and moved tokens are gathered, added, and divided.

    >>> elements(merge(1, 4, 2, 8))
    144
    """
    heads, moved = batch * (tokens - r) * channels, batch * r * channels
    return [
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
) -> list[Work]:
    """What merging r tokens in one block takes: one matching, and merges and unmerges.

    >>> flops(patch(2, 4096, 320, r=2048))
    1006632960

    The arguments are those of `pays`.
    """
    branches = branches or Branches()
    if destinations is None:
        destinations = min(-(-tokens // 4), tokens - r)
    near = candidates(tokens, destinations, window)
    work = matching(batch, tokens, tokens - destinations, near, r, channels)
    inward, outward = merge(batch, tokens, r, channels), unmerge(batch, tokens, channels)
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


def seconds(work: Iterable[Work], device_kind: str) -> float:
    """An estimate, from the rates of the device alone: one operation after the other.

    >>> f"{seconds(self_attention(2, 4096, 4096, 320), 'cpu'):.2f}"
    '0.67'

    Raises TypeError if device_kind is not a string.
    """
    speed = rates(device_kind)
    return sum(each.seconds(speed) for each in work)


def balance(
    device_kind: str,
    batch: int,
    tokens: int,
    r: int,
    channels: int,
    *,
    branches: Branches | None = None,
    destinations: int | None = None,
    window: int | None = WINDOW,
    text_tokens: int = TEXT_TOKENS,
    joint: bool = False,
) -> Balance:
    """What merging saves and spends in one block, in seconds: an estimate.

    >>> saved, spent = balance("cpu", 2, 4096, 2048, 320)
    >>> saved > 10 * spent
    True

    Takes and raises what `pays` does.
    """
    _check(batch, tokens, r, channels, destinations, window, text_tokens)
    kind = joint_block if joint else block
    full = kind(batch, tokens, channels, text_tokens=text_tokens)
    less = kind(batch, tokens, channels, r=r, branches=branches, text_tokens=text_tokens)
    own = patch(
        batch, tokens, channels, r, branches=branches, destinations=destinations, window=window
    )
    saved = seconds(full, device_kind) - seconds(less, device_kind)
    return Balance(saved, seconds(own, device_kind))


def pays(
    device_kind: str,
    batch: int,
    tokens: int,
    r: int,
    channels: int,
    *,
    branches: Branches | None = None,
    destinations: int | None = None,
    window: int | None = WINDOW,
    text_tokens: int = TEXT_TOKENS,
    joint: bool = False,
) -> bool:
    """Whether merging in blocks of this shape saves more time than it takes.

    >>> pays("cpu", 2, 4096, 2048, 320), pays("cpu", 2, 64, 32, 320)
    (True, False)

    device_kind: torch.device's type: see `rates`.
    batch, tokens, channels: the shape of the block's input.
    r: how many of the tokens merge, 0 (which never pays) to tokens − 1.
    branches: default: self-attention with its queries.
    destinations: how many of the tokens others may merge into, at most tokens − r; default one in
        four, as in cells of 2×2, or what r leaves of that.
    window: the side of the windows in which matches are looked for, in tokens; None: no windows.
    text_tokens: how many tokens the text has.
    joint: whether it is a block of SD3's or Flux's kind (see `joint_block`), not a UNet's.

    From shapes and rates alone, so that it is the same in every run. A GPU's rates are its peaks,
    with which what is saved, arithmetic, looks smaller than it is; what is spent is mostly calls.
    Raises TypeError for what is no whole number, ValueError for one out of its range.
    """
    saved, spent = balance(
        device_kind,
        batch,
        tokens,
        r,
        channels,
        branches=branches,
        destinations=destinations,
        window=window,
        text_tokens=text_tokens,
        joint=joint,
    )
    return r > 0 and saved > spent


def _check(
    batch: int,
    tokens: int,
    r: int,
    channels: int,
    destinations: int | None,
    window: int | None,
    text_tokens: int,
) -> None:
    _require("batch", batch, 1)
    _require("tokens", tokens, 1)
    _require("r", r, 0, tokens - 1)
    _require("channels", channels, 1)
    if destinations is not None:
        _require("destinations", destinations, 1, tokens - r)
    if window is not None:
        _require("window", window, 1)
    _require("text_tokens", text_tokens, 1)


def _require(name: str, value: object, low: int, high: int | None = None) -> None:
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, {allowed}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {allowed}, got {value}")
