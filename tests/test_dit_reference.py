"""A patched block computes what the host's own computes where merged tokens are equal tokens.

The reference matches with plain loops, and gives every token the mean of its group and the position
of its head. The unpatched block, on all of these tokens, then attends to a group as often as it has
tokens: proportional attention, with nothing added to any logit. What it adds to the means is given
back to the tokens. Nothing of this is shared with tomesd.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests import slow_reference
from tests.tiny_transformers import TEXT, TINY

H, W, BATCH = 5, 8, 2
N = H * W
# Their processors take no bias, and turn queries and keys by one table.
WITHOUT_PROPORTIONAL = {
    "QwenImageTransformer2DModel",
    "CogView4Transformer2DModel",
    "MochiTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
}
RATIO = 0.4
# What is beside the image tokens: nothing, the text, AuraFlow's registers and the text; Z-Image's
# padding to a multiple of 32, and its padded texts.
BESIDE = (0, TEXT, TEXT + 8, 24, 24 + 96)


class Call:
    """One block of a patched model and what the model called it with."""

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict):
        self.block, self.args, self.kwargs = block, args, kwargs

    @property
    def tokens(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def changed(self, change) -> "Call":
        """With `change` done to every tensor."""
        return Call(self.block, _each(self.args, change), _each(self.kwargs, change))

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        output = self.block(*self.args, **self.kwargs)
        return output if isinstance(output, tuple) else (output,)


def _each(value: Any, change) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(each, change) for key, each in value.items()}
    # Not the place of the grid, which is a tuple of its own type.
    if type(value) in (tuple, list):
        return type(value)(_each(each, change) for each in value)
    return value


def _calls(tiny, **settings) -> tuple[nn.Module, list[Call]]:
    """The merging blocks of a patched model, with the arguments that the model gives them."""
    model = tomesd.apply_patch(tiny.model().double(), **settings)
    calls: list[Call] = []

    def note(block, args, kwargs):
        calls.append(Call(block, args, kwargs))

    blocks = list(model._tomesd_patch.blocks)
    handles = [
        block.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for block in blocks
    ]
    with torch.no_grad():
        tiny.call(model, batch=BATCH, h=H, w=W)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(blocks)
    return model, calls


def _tokens_of(tiny, value: Tensor) -> tuple[int, slice] | None:
    """In which dimension a tensor has one entry for each image token, and where in it."""
    n = tiny.frames * N
    # Wan has its timesteps by token and branch, SkyReels by branch and token.
    for dim in (1, 0, 2) if value.dim() == 4 else (1, 0):
        if value.dim() > dim and value.shape[dim] - n in BESIDE:
            return dim, _places(tiny, value.shape[dim])
    return None


def _places(tiny, length: int) -> slice:
    """Those of the image tokens among so many."""
    n = tiny.frames * N
    return slice(n) if tiny.image_first else slice(length - n, length)


def _image(tiny, call: Call) -> Tensor:
    """The block's image tokens [B, n, C]."""
    return call.tokens[:, _places(tiny, call.tokens.shape[1])]


def _groups(x: Tensor, frames: int) -> list[list[int]]:
    """Of one sample's tokens [frames·N, C]: matched within each frame."""
    groups = []
    destinations = [y * W + x for y in range(0, H, 2) for x in range(0, W, 2)]
    sources = [token for token in range(N) if token not in destinations]
    for frame, tokens in enumerate(x.unflatten(0, (frames, N))):
        found = slow_reference.bipartite_soft_matching(
            tokens.tolist(), sources, destinations, int(RATIO * N)
        )
        groups += [[frame * N + token for token in group] for group in found]
    return groups


def _grouped(tiny, x: Tensor) -> list[list[list[int]]]:
    """Each sample's groups. Latte's frames are samples."""
    if tiny.one_map:
        return [_groups(torch.cat(list(x), dim=1), tiny.frames)] * len(x)
    return [_groups(sample, tiny.frames) for sample in x]


def _levelled(tiny, value: Tensor, groups: list, is_state: bool) -> Tensor:
    """Means of groups for token states, the head's entry for everything else."""
    where = _tokens_of(tiny, value)
    if where is None:
        return value
    dim, image = where
    batch = len(groups)
    value = value.expand(batch, *value.shape[1:]).clone() if dim else value.clone()
    for sample in range(batch):
        rows = (value[sample].movedim(dim - 1, 0) if dim else value)[image]
        before = rows.clone()
        for group in groups[sample]:
            rows[group] = before[group].mean(0) if is_state else before[group[0]]
        if dim == 0:
            break
    return value


@pytest.mark.parametrize("name", sorted(set(TINY) - WITHOUT_PROPORTIONAL))
def test_a_patched_block_attends_to_merged_tokens_as_the_hosts_own_to_equal_tokens(name):
    tiny = TINY[name]
    n = tiny.frames * N
    model, calls = _calls(tiny, ratio=RATIO, window=0)
    outputs = [call() for call in calls]
    tomesd.remove_patch(model)
    for call, got in zip(calls, outputs, strict=True):
        x, stream = _image(tiny, call), call.tokens
        groups = _grouped(tiny, x)
        levelled = _without_place(call).changed(
            lambda value, groups=groups, stream=stream: _levelled(
                tiny, value, groups, is_state=value is stream
            )
        )
        means = _image(tiny, levelled)
        want = levelled()
        assert any(len(group) > 1 for sample in groups for group in sample)
        for y, reference in zip(got, want, strict=True):
            if y is None:
                assert reference is None
                continue
            if y.shape[1] >= n:
                reference[:, _places(tiny, y.shape[1])] += x - means
            # Sizes and their logarithms are float32.
            torch.testing.assert_close(y, reference, rtol=0, atol=1e-6)


def _without_place(call: Call) -> Call:
    """What the unpatched host would be given: no grid travels along."""

    def cleaned(value):
        if isinstance(value, dict):
            return {key: each for key, each in value.items() if key != "tomesd_place"}
        if type(value) is tuple and value and type(value[-1]).__name__ == "_Place":
            return value[:-1]
        return value

    kwargs = {key: cleaned(value) for key, value in call.kwargs.items()}
    return Call(call.block, tuple(cleaned(value) for value in call.args), kwargs)


@pytest.mark.parametrize("name", sorted(set(TINY) - WITHOUT_PROPORTIONAL))
def test_merging_one_pair_of_identical_tokens_changes_nothing(name):
    tiny = TINY[name]
    n = tiny.frames * N
    twin, of = 1, 0  # A source and the destination of its cell.

    def twinned(value: Tensor) -> Tensor:
        where = _tokens_of(tiny, value)
        if where is None:
            return value
        dim, image = where
        value = value.clone()
        rows = value.movedim(dim, 0)[image]
        for first in range(0, n, N):
            rows[first + twin] = rows[first + of]
        return value

    # One token merges in each picture or frame.
    model, calls = _calls(tiny, ratio=1 / N)
    calls = [call.changed(twinned) for call in calls]
    merged = [call() for call in calls]
    for hooks in model._tomesd_patch.blocks.values():
        assert hooks.counts[:2] == (n, n - tiny.frames)
    tomesd.remove_patch(model)
    for call, got in zip(calls, merged, strict=True):
        for y, want in zip(got, _without_place(call)(), strict=True):
            if y is not None:
                torch.testing.assert_close(y, want, rtol=0, atol=1e-6)


TOGETHER = {
    "AuraFlowTransformer2DModel",
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
}


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_a_text_token_never_merges(name):
    """However alike they are: in one stream with the image's."""
    tiny = TINY[name]
    model, calls = _calls(tiny, ratio=0.5)
    single = calls[-1].changed(lambda value: torch.ones_like(value) if value.dim() == 3 else value)
    maps = []
    hooks = model._tomesd_patch.blocks[single.block]
    single.block.register_forward_pre_hook(lambda *_: maps.append(hooks.model.run.map))
    single()
    (token_map,) = maps
    image = set(range(token_map.n)[_places(tiny, token_map.n)])
    assert len(image) == N < token_map.n
    for group, size in zip(token_map.group.tolist(), token_map.size[..., 0].tolist(), strict=True):
        of_image = {group[token] for token in image}
        of_text = [group[token] for token in range(token_map.n) if token not in image]
        assert len(of_image) == N // 2
        assert len(of_text) == len(set(of_text))
        assert of_image.isdisjoint(of_text)
        assert all(size[token] == 1 for token in of_text)
