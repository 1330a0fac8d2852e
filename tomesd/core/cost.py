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
from tomesd.core.workload import (
    JOINT_OPERATORS,
    OPERATORS,
    TEXT_TOKENS,
    Branches,
    Work,
    block,
    joint_block,
)


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    matmul, attention: FLOPs per second of matrix products and of fused attention.
    memory: bytes per second of contiguous reads and writes.
    rows: bytes per second of rows gathered or scattered by index, as merging and unmerging do.
    best, topk: bytes per second of similarities, for the maximum of each row and for the r largest.
    call: seconds that an operator takes at least.
    itemsize: bytes per number in the precision that the rates are for.
    host: seconds that eager PyTorch takes to prepare an operator for a device that works meanwhile.
    """

    matmul: float
    attention: float
    memory: float
    rows: float
    best: float
    topk: float
    call: float
    itemsize: int
    host: float = 0.0


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

# Eager PyTorch needs about this long to prepare an operator, in Python and its dispatcher, while a
# GPU is still busy. Assumed: it is the CPU's speed, and 5 to 20 µs are usual.
_HOST = 10e-6


def _published(teraflops: float, gigabytes: float) -> Rates:
    """A GPU's peaks in half precision, with sums in fp32. Real kernels stay below them, which
    understates what merging saves.

    call: launching a kernel takes 4 to 6 µs (measured by others on an RTX 5070 Ti:
    susun-blog.com/blog/pegainfer-3-cuda-graph).
    """
    moved = gigabytes * 1e9
    flops = teraflops * 1e12
    return Rates(flops, flops, moved, moved, moved, moved, call=5e-6, itemsize=2, host=_HOST)


# Published, not measured: TFLOP/s of tensor cores in half precision without sparsity, and GB/s of
# memory, from NVIDIA's architecture papers and data sheets. GeForce cards add to sums in fp32 at
# twice their rate of fp32 arithmetic. Of names that contain one another the longest counts.
PUBLISHED = {
    "RTX 3060": (25.5, 360),
    "RTX 3070": (40.6, 448),
    "RTX 3080": (59.5, 760),
    "RTX 3090": (71, 936),
    "RTX 4060": (30.2, 272),
    "RTX 4070": (58.3, 504),
    "RTX 4080": (97.5, 717),
    "RTX 4090": (165.2, 1008),
    "RTX 5070": (61.7, 672),
    "RTX 5080": (112.6, 960),
    "RTX 5090": (209.5, 1792),
    "T4": (65, 320),
    "L4": (121, 300),
    "L40S": (362, 864),
    "A10": (125, 600),
    "A100": (312, 1555),
    "H100 PCIe": (756, 2039),
    "H100": (989, 3352),
    "H200": (989, 4800),
}
# Of GPUs that are not in the tables: fast arithmetic, with which merging pays least.
CUDA = _published(*PUBLISHED["RTX 4090"])

# Measured by `scripts/gpu.py --part rates`, by the name of the device: none yet.
MEASURED: dict[str, Rates] = {}


class Balance(NamedTuple):
    """Seconds that merging saves in one block, and seconds that it costs."""

    saved: float
    spent: float

    @property
    def pays(self) -> bool:
        return self.saved > self.spent


def rates(device_kind: str) -> Rates:
    """The rates of a kind of device.

    >>> rates("cpu").itemsize, rates("NVIDIA GeForce RTX 3060").memory
    (4, 360000000000.0)

    device_kind: torch.device's type, or the name of a GPU. Measured rates go before published ones.
        Devices that are in neither table use those of an RTX 4090, the conservative choice: with
        fast arithmetic and expensive calls merging pays least.
    Raises TypeError if it is not a string.
    """
    if not isinstance(device_kind, str):
        raise TypeError(f'device_kind must be a string such as "cuda", got {device_kind!r}')
    if device_kind == "cpu":
        return CPU
    if device_kind in MEASURED:
        return MEASURED[device_kind]
    words = f" {device_kind.replace('-', ' ')} "
    known = [name for name in PUBLISHED if f" {name} " in words]
    return _published(*PUBLISHED[max(known, key=len)]) if known else CUDA


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
    fused: bool = False,
    eager: bool = True,
) -> Balance:
    """Estimate what merging saves and costs in one block of this shape, in seconds.

    >>> balance("cpu", 2, 4096, 2048, 320).pays, balance("cpu", 2, 16, 8, 320).pays
    (True, False)

    device_kind: torch.device's type or a GPU's name: see `rates`.
    batch, tokens, channels: the shape of the block's input.
    r: how many of the tokens merge, from 0 (which never pays) to tokens − 1.
    branches: which branches merge; default: self-attention.
    destinations: how many tokens are destinations, at most tokens − r; default one in four, as in
        cells of 2×2, or what r leaves of that.
    window: the side of the windows that tokens are matched in, in tokens; None: no windows.
    refine, keep_norm: as in `DiffusionSettings`.
    text_tokens: how many tokens the text has.
    joint: a block with joint attention to text, as in SD3 and Flux (`joint_block`).
    fused: whether kernels match, merge and unmerge (`tomesd.kernels`).
    eager: whether Python prepares each operator. A GPU then waits for it where the operators are
        short: there merging saves nothing, and its own operators cost what their preparation does.

    A GPU's published rates are its peaks, which understates the arithmetic that is saved.
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
        fused=fused,
    )
    return weigh(full, less, own, device_kind, joint=joint, eager=eager)


def host_seconds(device_kind: str, joint: bool = False) -> float:
    """Seconds that eager PyTorch takes to prepare the operators of one unmerged block.

    >>> f"{host_seconds('NVIDIA GeForce RTX 4090'):.4f}"
    '0.0003'
    """
    return rates(device_kind).host * (JOINT_OPERATORS if joint else OPERATORS)


def weigh(
    full: Iterable[Work],
    less: Iterable[Work],
    own: Iterable[Work],
    device_kind: str,
    *,
    joint: bool = False,
    eager: bool = True,
) -> Balance:
    """`balance` of a block's work, of what is left of it, and of the work of merging.

    An eager GPU takes as long as its own work, or as Python takes to prepare it.
    """
    own = list(own)
    block = host_seconds(device_kind, joint) if eager else 0.0
    merging = sum(each.calls for each in own) * rates(device_kind).host if eager else 0.0
    rest = seconds(less, device_kind)
    merged = max(rest + seconds(own, device_kind), block + merging)
    rest = max(rest, block)
    return Balance(max(seconds(full, device_kind), block) - rest, merged - rest)
