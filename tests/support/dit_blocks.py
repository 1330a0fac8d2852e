"""Single blocks of patched transformers, and matching with plain loops: nothing of it is tomesd's.

A model's blocks are taken out with what the model calls them with, so that each can be called
directly, patched or not, on these tokens or on others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tomesd
from tests.support import slow_reference
from tests.support.tiny_transformers import CONTROLNETS, DIT, TEXT_TOKENS, TINY, TinyTransformer
from tomesd.diffusion.block import Place

# Every class of transformers that merges, or a kind of it.
FAMILIES = TINY | {DIT.name: DIT} | CONTROLNETS
# Their processors take no bias, and turn queries and keys by one table.
WITHOUT_PROPORTIONAL = {
    "QwenImageTransformer2DModel",
    "QwenImageControlNetModel",
    "CogView4Transformer2DModel",
    "MochiTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
    "GlmImageTransformer2DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "LuminaNextDiT2DModel",
    "PRXTransformer2DModel",
    "HiDreamImageTransformer2DModel",
}
BATCH = 2
# What is beside the image tokens: nothing, the text, or with a mode in front; AuraFlow's registers
# and the text; Z-Image's padding to a multiple of 32, and its padded texts; HiDream's padding, and
# its three texts; what Fibo 2 makes of its text.
BESIDE = (0, TEXT_TOKENS, TEXT_TOKENS + 1, TEXT_TOKENS + 8, 24, 24 + 96, 4, 4 + 3 * TEXT_TOKENS, 7)


class Call:
    """One block of a patched model and what the model called it with, [batch, tokens, channels]."""

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict, batch_first: bool = True):
        self.block, self.args, self.kwargs = block, args, kwargs
        self.batch_first = batch_first

    @property
    def tokens(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """With `change` done to every tensor."""
        args, kwargs = _each(self.args, change), _each(self.kwargs, change)
        return Call(self.block, args, kwargs, self.batch_first)

    def without_place(self) -> "Call":
        """What the unpatched host would be given: no grid travels along."""
        kwargs = {key: _cleaned(value) for key, value in self.kwargs.items()}
        return Call(self.block, tuple(map(_cleaned, self.args)), kwargs, self.batch_first)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        given = self if self.batch_first else self.changed(swapped)
        output = given.block(*given.args, **given.kwargs)
        output = output if isinstance(output, tuple) else (output,)
        return output if self.batch_first else tuple(map(swapped, output))


def swapped(value: Tensor) -> Tensor:
    """[tokens, batch, channels] for [batch, tokens, channels], or the reverse."""
    return value.transpose(0, 1) if value.dim() == 3 else value


def _each(value: Any, change) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(each, change) for key, each in value.items()}
    # Not the place of the grid, which is a tuple of its own type.
    if type(value) in (tuple, list):
        return type(value)(_each(each, change) for each in value)
    return value


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if key != "tomesd_place"}
    if type(value) is tuple and value and isinstance(value[-1], Place):
        return value[:-1]
    return value


def grid(tiny: TinyTransformer) -> tuple[int, int]:
    """One that cells of 2×2 tokens do not divide, but for DiT, which knows squares alone."""
    return (6, 6) if tiny is DIT else (5, 8)


def tokens(tiny: TinyTransformer) -> int:
    """How many the image or video has."""
    h, w = grid(tiny)
    return tiny.frames * h * w


def calls(tiny: TinyTransformer, **settings) -> tuple[nn.Module, list[Call]]:
    """The merging blocks of a patched model, with the arguments that the model gives them."""
    model = tomesd.apply_patch(tiny.build().double(), **settings)
    found: list[Call] = []

    def note(block, args, kwargs):
        call = Call(block, args, kwargs, tiny.batch_first)
        found.append(call if tiny.batch_first else call.changed(swapped))

    blocks = list(model._tomesd_patch.blocks)
    handles = [
        block.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for block in blocks
    ]
    h, w = grid(tiny)
    with torch.no_grad():
        tiny.call(model, batch=BATCH, h=h, w=w)
    for handle in handles:
        handle.remove()
    assert len(found) == len(blocks)
    # As within the model's forward: a block that another model calls is left as it is.
    model._tomesd_patch.hooks.state.inside = True
    return model, found


def tokens_of(
    tiny: TinyTransformer, value: Tensor, dims: tuple[int, ...]
) -> tuple[int, slice] | None:
    """In which of these dimensions a tensor has one entry for each image token, and where in it."""
    for dim in dims:
        if -value.dim() <= dim < value.dim() and value.shape[dim] - tokens(tiny) in BESIDE:
            return dim % value.dim(), places(tiny, value.shape[dim])
    return None


def places(tiny: TinyTransformer, length: int) -> slice:
    """Those of the image tokens among so many."""
    n = tokens(tiny)
    return slice(n) if tiny.image_first else slice(length - n, length)


def image(tiny: TinyTransformer, call: Call) -> Tensor:
    """The block's image tokens [B, n, C]."""
    return call.tokens[:, places(tiny, call.tokens.shape[1])]


def _groups(x: Tensor, frames: int, h: int, w: int, ratio: float) -> list[list[int]]:
    """Of one sample's tokens [frames·h·w, C]: matched within each frame."""
    groups = []
    n = h * w
    destinations = [y * w + x for y in range(0, h, 2) for x in range(0, w, 2)]
    sources = [token for token in range(n) if token not in destinations]
    for frame, features in enumerate(x.unflatten(0, (frames, n))):
        found = slow_reference.bipartite_soft_matching(
            features.tolist(), sources, destinations, int(ratio * n)
        )
        groups += [[frame * n + token for token in group] for group in found]
    return groups


def grouped(tiny: TinyTransformer, x: Tensor, ratio: float) -> list[list[list[int]]]:
    """Each sample's groups, heads first. Latte's frames are samples."""
    how = (tiny.frames, *grid(tiny), ratio)
    if tiny.one_map:
        return [_groups(torch.cat(list(x), dim=1), *how)] * len(x)
    return [_groups(sample, *how) for sample in x]
