"""Recording which tokens merge while a model runs; nothing of what it computes is changed."""

import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tomesd.api import _PATCH, _patched
from tomesd.diffusion.dit.patch import TransformerPatch
from tomesd.diffusion.unet.patch import UNetPatch
from tomesd.vit.patch import ViTPatch


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Which tokens are one token at one place of a model, in one of its forwards.

    >>> after_last_layer = traced[-1]
    >>> after_last_layer.patches.shape
    torch.Size([1, 14, 14])

    model: the name of the patched model in what was traced, as `tomesd.report` gives it.
    step: the number of the model's forward within the trace, from 0: the denoising step.
    where: the block. In a Vision Transformer tokens merge for good, and this is what has become of
        its input tokens after that block; in a denoiser, what merges inside of that block alone.
    group: int64 [B, prefix + patches], on the CPU: the group of each of the tokens, −1 where it was
        dropped. The same number is the same group only within one sample.
    prefix: how many class, distillation and register tokens lead; each is a group of its own.
    grid: how the other tokens lie: (h, w) for pictures and latents, (frames, h, w) for videos,
        (frequencies, times) for sound; (patches,) where some are masked out.
    """

    model: str
    step: int
    where: str
    group: Tensor
    prefix: int
    grid: tuple[int, ...]

    @property
    def patches(self) -> Tensor:
        """One integer for each patch: int64 [B, *grid], without the prefix."""
        return self.group[:, self.prefix :].unflatten(1, self.grid)


@contextmanager
def trace(model: Any) -> Iterator[list[TokenGroups]]:
    """Record which tokens merge in every patched model of a pipeline or module, inside a `with`.

    >>> with tomesd.trace(vit) as traced:
    ...     vit(images)
    >>> traced[-1].patches  # which patches ended up in which final token: [B, h, w]

    model: patched by `apply_patch`; it may get other settings inside the block. The list fills
        while the model runs, in the order of its blocks: for a Vision Transformer a TokenGroups for
        each layer of each forward, for a denoiser one for each block that merges, in each step.
        What merges nothing (r=0, ratio=0) leaves no record. What gradient checkpointing computes
        again is recorded once.
    Records are copied to the CPU as they are made, which waits for a GPU. Compiled models run
    uncompiled inside the block: nothing can be recorded from within a compiled graph.
    Raises ValueError if nothing in the model is patched.
    Source: ToMe, Figures 4 and 6 are drawn from this.
    """
    found = _patched(model)
    if not found:
        raise ValueError(f"model must be patched, got a {type(model).__name__} without a patch")
    traced: list[TokenGroups] = []
    with ExitStack() as stack:
        for name, target in found.items():
            patch = getattr(target, _PATCH)
            watch = next(_WATCHES[kind] for kind in _WATCHES if isinstance(patch, kind))
            for handle in watch(name, target, traced):
                stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield traced


def _watch_vit(name: str, vit: Any, traced: list[TokenGroups]) -> Iterator[RemovableHandle]:
    steps = itertools.count()
    grids: dict[int, tuple[int, ...]] = {}  # By thread.

    def note_grid(conv: nn.Module, args: tuple, output: Tensor) -> None:
        grids[threading.get_ident()] = tuple(output.shape[2:])

    def record(block: nn.Module, args: tuple, output: Any) -> None:
        patch: ViTPatch | None = vit.__dict__.get(_PATCH)
        # The last block may run again, for gradient checkpointing; the patches are made once.
        shape = grids.pop(threading.get_ident(), None)
        if shape is None or patch is None or not any(patch.run.schedule):
            return
        step = next(steps)
        patches = patch.run.maps[0].n - patch.prefix
        if math.prod(shape) != patches:  # A masked autoencoder: the others are in random order.
            shape = (patches,)
        traced.extend(
            [
                TokenGroups(name, step, f"layer {layer}", so_far.group.cpu(), patch.prefix, shape)
                for layer, so_far in enumerate(patch.run.maps[1:])
            ]
        )

    # In all families a convolution makes the patches, and its output is their grid.
    for module in vit.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            yield module.register_forward_hook(note_grid)
    yield getattr(vit, _PATCH).seams[-1].block.register_forward_hook(record)


def _watch_denoiser(name: str, unet: Any, traced: list[TokenGroups]) -> Iterator[RemovableHandle]:
    names = {module: where for where, module in unet.named_modules()}
    seen: set[nn.Module] = set()
    step = -1

    def begin(model: nn.Module, args: tuple) -> None:
        nonlocal step
        step += 1
        seen.clear()

    def record(index: int, block: nn.Module, args: tuple, output: Any) -> None:
        patch: UNetPatch | None = unet.__dict__.get(_PATCH)
        # Gradient checkpointing runs blocks again.
        if patch is None or block not in patch.blocks or block in seen:
            return
        seen.add(block)
        merged = patch.blocks[block].map
        if merged is None:
            return
        grid = patch.transformers[index].h, patch.transformers[index].w
        traced.append(TokenGroups(name, step, names[block], merged.group.cpu(), 0, grid))

    yield unet.register_forward_pre_hook(begin)
    for index, found in enumerate(getattr(unet, _PATCH).transformers):
        for block in getattr(found.module, "transformer_blocks", []):
            # Before the patch's own last hook, which forgets the block's map.
            yield block.register_forward_hook(partial(record, index), prepend=True)


def _watch_transformer(
    name: str, model: Any, traced: list[TokenGroups]
) -> Iterator[RemovableHandle]:
    names = {module: where for where, module in model.named_modules()}
    seen: set[nn.Module] = set()
    step = -1

    def begin(model: nn.Module, args: tuple) -> None:
        nonlocal step
        step += 1
        seen.clear()

    def record(block: nn.Module, args: tuple, output: Any) -> None:
        patch: TransformerPatch | None = model.__dict__.get(_PATCH)
        # Gradient checkpointing runs blocks again.
        if patch is None or block not in patch.blocks or block in seen:
            return
        seen.add(block)
        merged, place = patch.hooks.run.map, patch.hooks.place
        if merged is None or place is None:
            return
        (frames, h, w), *others = place.grids
        tokens = sum(math.prod(grid) for grid in place.grids)
        grid: tuple[int, ...] = (h, w) if frames == 1 else (frames, h, w)
        if others:  # Reference pictures beside its own.
            grid = (tokens,)
        prefix = 0 if patch.blocks[block].kind.image_first else merged.n - tokens
        group = merged.group[:, : prefix + tokens].cpu()
        traced.append(TokenGroups(name, step, names[block], group, prefix, grid))

    yield model.register_forward_pre_hook(begin)
    for block in getattr(model, _PATCH).blocks:
        # Before the patch's own last hook, which forgets the block's map.
        yield block.register_forward_hook(record, prepend=True)


_WATCHES = {
    ViTPatch: _watch_vit,
    UNetPatch: _watch_denoiser,
    TransformerPatch: _watch_transformer,
}
