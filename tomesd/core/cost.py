"""What token merging saves and costs in seconds: an estimate from shapes and a device's rates.

Each operation of `tomesd.core.workload` and `tomesd.core.merging_work` takes as long as the slowest
of its arithmetic, its memory traffic and its calls. Nothing is timed, so a model behaves the same
in every run. See docs/performance.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tomesd.checks import require_int
from tomesd.core.merging_work import WINDOW, patch
from tomesd.core.workload import TEXT_TOKENS, Branches, Work, block, joint_block


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    matmul, attention: FLOPs per second of matrix products and of fused attention.
    memory: bytes per second of contiguous reads and writes.
    rows: bytes per second of rows gathered or scattered by index, as merging and unmerging do.
    best, topk: bytes per second of similarities, for the maximum of each row and for the r largest.
    call: seconds that an operator takes at least.
    itemsize: bytes per number in the precision that the rates are for.
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


class Balance(NamedTuple):
    """Seconds that merging saves in one block, and seconds that it costs."""

    saved: float
    spent: float

    @property
    def pays(self) -> bool:
        return self.saved > self.spent


def rates(device_kind: str) -> Rates:
    """The rates of a kind of device.

    >>> rates("cpu").itemsize
    4

    device_kind: torch.device's type. Devices other than "cpu" use the GPU's rates, the conservative
        choice: with fast arithmetic and expensive calls merging pays least.
    Raises TypeError if it is not a string.
    """
    if not isinstance(device_kind, str):
        raise TypeError(f'device_kind must be a string such as "cuda", got {device_kind!r}')
    return CPU if device_kind == "cpu" else CUDA


def seconds(work: Iterable[Work], device_kind: str) -> float:
    """An estimate, from the rates of the device alone: one operation after the other.

    >>> from tomesd.core.workload import self_attention
    >>> f"{seconds(self_attention(2, 4096, 4096, 320), 'cpu'):.2f}"
    '0.67'

    Raises TypeError if device_kind is not a string.
    """
    speed = rates(device_kind)
    return sum(slowest(each, speed) for each in work)


def slowest(work: Work, speed: Rates) -> float:
    """Seconds of one operation: those of its arithmetic, its traffic or its calls."""
    arithmetic: float = getattr(speed, work.arithmetic)
    traffic: float = getattr(speed, work.traffic)
    return max(
        work.flops / arithmetic,
        work.elements * speed.itemsize / traffic,
        work.calls * speed.call,
    )


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
    refine: int = 0,
    keep_norm: bool = True,
    text_tokens: int = TEXT_TOKENS,
    joint: bool = False,
) -> Balance:
    """Estimate what merging saves and costs in one block of this shape, in seconds.

    >>> balance("cpu", 2, 4096, 2048, 320).pays, balance("cpu", 2, 16, 8, 320).pays
    (True, False)

    device_kind: torch.device's type: see `rates`.
    batch, tokens, channels: the shape of the block's input.
    r: how many of the tokens merge, from 0 (which never pays) to tokens − 1.
    branches: which branches merge; default: self-attention.
    destinations: how many tokens are destinations, at most tokens − r; default one in four, as in
        cells of 2×2, or what r leaves of that.
    window: the side of the windows that tokens are matched in, in tokens; None: no windows.
    refine, keep_norm: as in `DiffusionSettings`.
    text_tokens: how many tokens the text has.
    joint: a block with joint attention to text, as in SD3 and Flux (`joint_block`).

    The GPU's rates are its peaks, which understates the arithmetic that is saved; what merging
    costs is mostly calls.
    Raises TypeError for a value that is not an int, ValueError for one out of range.
    """
    require_int("batch", batch, 1)
    require_int("tokens", tokens, 1)
    require_int("r", r, 0, tokens - 1)
    require_int("channels", channels, 1)
    if destinations is not None:
        require_int("destinations", destinations, 1, tokens - r)
    if window is not None:
        require_int("window", window, 1)
    require_int("text_tokens", text_tokens, 1)
    kind = joint_block if joint else block
    full = kind(batch, tokens, channels, text_tokens=text_tokens)
    less = kind(batch, tokens, channels, r=r, branches=branches, text_tokens=text_tokens)
    own = patch(
        batch,
        tokens,
        channels,
        r,
        branches=branches,
        destinations=destinations,
        window=window,
        refine=refine,
        keep_norm=keep_norm,
    )
    saved = seconds(full, device_kind) - seconds(less, device_kind)
    return Balance(saved, seconds(own, device_kind))
