"""Registers and shared memory of each kernel, compiled for GPUs that need not be there."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.context import Case, Context, Row

# Compute capabilities: A100; RTX 30; RTX 40 and L4; H100; B200; RTX 50.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Bytes of shared memory that one block of threads may have, by CUDA's programming guide.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

# Types of arguments that do not follow the dtype of the tokens; all others are numbers.
_POINTERS = {
    **dict.fromkeys(("similarity", "size", "weight"), "*fp32"),
    **dict.fromkeys(("target", "into", "place"), "*i32"),
    **dict.fromkeys(
        ("order", "cut", "group_rows", "head_rows", "moved_rows", "first"),
        "*i64",
    ),
}
_TOKENS = ("x", "y", "merged", "out", "grad", "grad_x")


class Variant(NamedTuple):
    """A kernel as it is launched. constants: those of its tiles, and what it is specialized in."""

    kernel: Any
    constants: dict[str, int]
    warps: int
    stages: int
    name: str


def variants(dtype: str, channels: int) -> Iterator[Variant]:
    """All kernels for tokens of this dtype and so many channels."""
    from tomesd.kernels import launches, matching, merging  # Late: they import Triton.

    tile = launches.match_tile(DTYPES[dtype])
    stages, warps = tile.pop("num_stages"), tile.pop("num_warps")
    yield Variant(matching.match_kernel, tile, warps, stages, "match")
    if dtype == "fp16":  # The others do not see the tokens.
        for name, constants, warps in (
            ("cut", {"BLOCK": launches.BLOCK}, launches.CUT_WARPS),
            ("link", {"TILE": launches.LINK_TILE, "BLOCK": launches.LINK_BLOCK}, 4),
            ("number", {"BLOCK": launches.BLOCK}, 4),
            ("join", {"BLOCK": launches.BLOCK}, 4),
        ):
            yield Variant(getattr(matching, f"{name}_kernel"), constants, warps, 3, name)
    for how, code in launches.HOWS.items():
        if how == "sum":  # The mean without the division.
            continue
        (high, wide), _ = launches.tiles(1, channels, how == "direction")
        tile = {"HOW": code, "HEADS": high, "BLOCK": wide}
        yield Variant(merging.merge_kernel, tile, 4, 3, f"merge, {how}")
        yield Variant(merging.merge_backward_kernel, tile, 4, 3, f"merge backward, {how}")
    (high, wide), _ = launches.tiles(1, channels)
    for name, residual in (("unmerge", False), ("unmerge with the residual", True)):
        tile = {"RESIDUAL": residual, "ROWS": high, "BLOCK": wide}
        yield Variant(merging.unmerge_kernel, tile, 4, 3, name)


def compile_for(variant: Variant, dtype: str, architecture: int) -> Row:
    """Compile a kernel: its registers a thread, and bytes of stack and of shared memory.

    Spilled registers are in the stack, and no kernel has anything else there.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = variant.kernel
    names = list(kernel.arg_names)
    signature = {
        name: "constexpr"
        if name in variant.constants
        else _POINTERS.get(name, f"*{dtype}" if name in _TOKENS else "i32")
        for name in names
    }
    # As Triton finds them at a launch: tensors are aligned, and channels a multiple of 16.
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n == "channels"]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared}


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of the only kernel in a cubin, as cuobjdump prints them."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        )
    fields = dict(each.split(":") for each in done.stdout.split() if each.count(":") == 1)
    return int(fields["REG"]), int(fields["STACK"])


def cases(context: Context) -> Sequence[Case]:
    if sys.platform != "linux":  # Where Triton is.
        return []
    architectures = (89,) if context.quick else ARCHITECTURES
    return [Case(f"sm_{each}", partial(usage, context, each), 60) for each in architectures]


def usage(context: Context, architecture: int) -> Row:
    """Of each kernel, for each dtype: with tokens of 320 channels or more, whose tiles are all
    alike."""
    found: Row = {}
    for dtype in DTYPES:
        for variant in variants(dtype, 320):
            if context.quick and (dtype, variant.name) != ("fp16", "join"):
                continue
            name = f"{variant.name}, {dtype}"
            found[name] = compile_for(variant, dtype, architecture)
    return {"kernels": found, "shared limit": SHARED[architecture] * 1024}
