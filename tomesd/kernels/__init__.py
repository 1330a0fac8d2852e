"""Fused GPU kernels for matching, merging and unmerging, and when they run.

Only this module is imported without Triton. What it calls is chosen in `usable` alone; everything
that it turns away runs as `tomesd.core` does it in PyTorch, which is the reference.
"""

import os
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from tomesd.kernels.device import gpu_name, is_exporting, runs_kernels


class Groups(Protocol):
    """What kernels read of a `TokenMap`."""

    @property
    def group_rows(self) -> Tensor: ...
    @property
    def head_rows(self) -> Tensor: ...
    @property
    def moved_rows(self) -> Tensor: ...
    @property
    def size(self) -> Tensor: ...
    @property
    def first(self) -> Tensor | None: ...


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HAS_TRITON = find_spec("triton") is not None
_enabled = os.environ.get("TOMESD_KERNELS", "1") != "0"


def use_kernels(enabled: bool) -> None:
    """Choose between fused Triton kernels on NVIDIA GPUs (the default) and PyTorch alone.

    >>> tomesd.use_kernels(False)

    enabled: for the whole process, from the next forward pass on. TOMESD_KERNELS=0 in the
        environment is the same as False from the start.
    Kernels run on NVIDIA GPUs with compute capability 8.0 or above where Triton is installed, in
    float16, bfloat16 and float32. The maps equal PyTorch's up to the rounding of similarities; sums
    have a fixed order, so two runs give the same bits.
    Raises TypeError unless enabled is a bool.
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {enabled!r}")
    _enabled = enabled


def enabled() -> bool:
    """What `use_kernels` was last told."""
    return _enabled


def usable(x: Tensor, *others: Tensor, constants: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether kernels run on these tensors: all of one dtype, on a GPU that has them.

    constants: on the same device, of any dtype; kernels do not compute their gradients.
    """
    rest = tuple(each for each in constants if each is not None)
    return (
        available(x.device)
        and x.dtype in _DTYPES
        and x.numel() > 0
        and all(each.dtype == x.dtype for each in others)
        and all(each.device == x.device for each in (*others, *rest))
        and not any(each.requires_grad for each in rest)
        # Fake tensors, shards and the like know operators only; functorch's have no memory.
        and (torch.compiler.is_compiling() or all(map(_is_plain, (x, *others, *rest))))
    )


def available(device: torch.device) -> bool:
    """Whether kernels run on this device: what is traced for elsewhere has none."""
    return (
        _enabled
        and _HAS_TRITON
        and device.type == "cuda"
        and not is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and runs_kernels(device.index or 0)
    )


def device_kind(device: torch.device) -> str:
    """The name of a GPU such as "NVIDIA GeForce RTX 4090", or the type of another device."""
    return device.type if device.type != "cuda" else gpu_name(device.index or 0) or "cuda"


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def token_map(metric: Tensor, order: Tensor, n_src: int, r: int) -> tuple[Tensor, ...]:
    """Bipartite soft matching in five launches: the fields of a `TokenMap`.

    metric: [B, N, C]. order, n_src: as in `partition.Windows`. r: from 1 to the sources.
    """
    from tomesd.kernels.gradients import call

    order = order.contiguous()
    similarity, target = call("match", metric.contiguous(), order, n_src)
    rows: tuple[Tensor, ...] = call("build", similarity, target, order, metric.shape[1], n_src, r)
    return rows


def merge(x: Tensor, groups: Groups, weight: Tensor | None, how: str) -> Tensor:
    """Reduce every group to one token, [B, N, C] → [B, M, C]: as `TokenMap.merge`."""
    from tomesd.kernels.gradients import Merge, call

    rows = groups.head_rows.contiguous(), *_sorted_by_group(groups)
    args = (
        x.contiguous(),
        *rows,
        groups.size.contiguous(),
        None if weight is None else weight.contiguous(),
        how if weight is None else "weighted",
    )
    merged: Tensor = Merge.apply(*args) if _needs_gradient(x) else call("merge", *args)
    return merged


def unmerge(y: Tensor, groups: Groups) -> Tensor:
    """Copy each group to its tokens, [B, M, C] → [B, N, C]; zeros for dropped tokens."""
    from tomesd.kernels.gradients import Unmerge, call

    args = y.contiguous(), groups.group_rows.contiguous()
    unmerged: Tensor = (
        Unmerge.apply(*args, groups.head_rows.contiguous(), *_sorted_by_group(groups))
        if _needs_gradient(y)
        else call("unmerge", *args)
    )
    return unmerged


def add_residual(x: Tensor, y: Tensor, merged: Tensor, groups: Groups) -> Tensor:
    """x + unmerge(y − merged) in one launch."""
    from tomesd.kernels.gradients import AddResidual, call

    args = *(each.contiguous() for each in (x, y, merged)), groups.group_rows.contiguous()
    added: Tensor = (
        AddResidual.apply(*args, groups.head_rows.contiguous(), *_sorted_by_group(groups))
        if _needs_gradient(x, y, merged)
        else call("add_residual", *args)
    )
    return added


def _sorted_by_group(groups: Groups) -> tuple[Tensor, Tensor]:
    """moved_rows sorted by group, and where each group begins in them.

    Maps that are made by kernels have both; those that are composed of others are sorted here.
    """
    if groups.first is not None:
        return groups.moved_rows.contiguous(), groups.first.contiguous()
    moved = groups.moved_rows.flatten()
    into, order = groups.group_rows.flatten().index_select(0, moved).sort(stable=True)
    heads = torch.arange(groups.head_rows.numel(), device=into.device)
    first = torch.searchsorted(into, heads).view_as(groups.head_rows)
    return moved.index_select(0, order).view_as(groups.moved_rows), first


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
