"""Recording which tokens merge while a model runs; what it computes does not change."""

import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tomesd.api import not_patched_error, patches_of
from tomesd.hooks import PATCH, DenoiserPatch
from tomesd.vit.patch import ViTPatch


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Which tokens merged in one block of a model, in one of its forwards.

    >>> groups = torch.tensor([[0, 1, 1, 2, 3]])
    >>> TokenGroups("ViTModel", 0, "layer 0", groups, prefix=1, grid=(2, 2)).patches
    tensor([[[1, 1],
             [2, 3]]])

    model: the name of the patched model within the traced one, as in `tomesd.report`.
    step: the number of the model's forward within the trace, from 0: the denoising step.
    where: the block. In a Vision Transformer tokens merge for good, and these are the groups of the
        input tokens after that block; in a denoiser, or with within_blocks=True, of the tokens that
        merge inside that block.
    group: int64 [B, prefix + patches], on the CPU: the group of each token, −1 for a dropped one.
        Group numbers are per sample. Detection tokens (YOLOS) follow the patches.
    prefix: how many class, distillation and register tokens come first; each is its own group.
    grid: the layout of the other tokens: (h, w) for images and latents, (frames, h, w) for videos,
        (frequencies, times) for audio; (patches,) if some are masked out.
    """

    model: str
    step: int
    where: str
    group: Tensor
    prefix: int
    grid: tuple[int, ...]

    @property
    def patches(self) -> Tensor:
        """The group of each patch: int64 [B, *grid], without the prefix."""
        end = self.prefix + math.prod(self.grid)
        patches: Tensor = self.group[:, self.prefix : end].unflatten(1, self.grid)
        return patches


@contextmanager
def trace(model: Any) -> Iterator[list[TokenGroups]]:
    """Record which tokens merge in every patched model of a pipeline or module, in a `with` block.

    >>> with tomesd.trace(vit) as traced:
    ...     output = vit(images)
    >>> traced[-1].patches  # which patches ended up in which final token: [B, h, w]

    model: patched by `apply_patch`; it may be patched again inside the block. The list fills while
        the model runs, in the order of its blocks: for a Vision Transformer one TokenGroups per
        layer and forward, for a denoiser one per merging block and step. Blocks that merge nothing
        (r=0, ratio=0) leave no record. Blocks that gradient checkpointing recomputes are recorded
        once.

    Records are copied to the CPU at once, which is a device sync. Compiled models run uncompiled
    inside the block: nothing can be recorded from within a compiled graph.
    Raises ValueError if nothing in the model is patched.
    Source: ToMe, Figures 4 and 6 are drawn from this.
    """
    found = patches_of(model)
    if not found:
        raise not_patched_error(model)
    traced: list[TokenGroups] = []
    with ExitStack() as stack:
        for name, (target, patch) in found.items():
            watch = _watch_vit if isinstance(patch, ViTPatch) else _watch_denoiser
            for handle in watch(name, target, patch, traced):
                stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield traced


def _watch_vit(
    name: str, vit: Any, before: ViTPatch, traced: list[TokenGroups]
) -> Iterator[RemovableHandle]:
    steps = itertools.count()
    grids: dict[int, tuple[int, ...]] = {}  # By thread.

    def record_grid(conv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        is_linear = isinstance(conv, nn.Linear)  # Patches come cut out already, in one row.
        grids[threading.get_ident()] = tuple(output.shape[1:2] if is_linear else output.shape[2:])

    def record(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        patch: ViTPatch | None = vit.__dict__.get(PATCH)
        # Gradient checkpointing may run the last block again; patches are embedded once.
        grid = grids.pop(threading.get_ident(), None)
        if grid is None or patch is None or not any(patch.forward.schedule):
            return
        step, maps = next(steps), patch.traced()
        if not maps:
            return
        patches = next(iter(maps.values())).n - patch.protected
        if math.prod(grid) != patches:  # A masked autoencoder: the others are in random order.
            grid = (patches,)
        # All of a forward at once: other threads may be running the model too.
        traced.extend(
            [
                TokenGroups(name, step, f"layer {layer}", so_far.group.cpu(), patch.prefix, grid)
                for layer, so_far in maps.items()
            ]
        )

    # In all families a convolution embeds the patches, and its output is their grid.
    for where, module in vit.named_modules():
        cut_out = isinstance(module, nn.Linear) and where.endswith(
            ("patch_embedding", "patch_projection")
        )
        if cut_out or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield module.register_forward_hook(record_grid)
    yield before.points[-1].block.register_forward_hook(record)


def _watch_denoiser(
    name: str, model: Any, before: DenoiserPatch, traced: list[TokenGroups]
) -> Iterator[RemovableHandle]:
    names = {module: where for where, module in model.named_modules()}
    seen: set[nn.Module] = set()
    step = -1

    def begin(model: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal step
        step += 1
        seen.clear()

    def record(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        patch: DenoiserPatch | None = model.__dict__.get(PATCH)
        # Gradient checkpointing runs blocks again.
        if patch is None or block not in patch.blocks or block in seen:
            return
        seen.add(block)
        found = patch.traced(block)
        if found is not None:
            group, prefix, grid = found
            traced.append(TokenGroups(name, step, names[block], group.cpu(), prefix, grid))

    yield model.register_forward_pre_hook(begin)
    for block in before.all_blocks():
        # Before the patch's own last hook, which forgets the block's map.
        yield block.register_forward_hook(record, prepend=True)
