"""A patched block computes what the host's own computes where merged tokens are equal tokens.

The reference matches with plain loops, and gives every token the mean of its group and the position
of its head. The unpatched block, on all of these tokens, then attends to a group as often as it has
tokens: proportional attention, with nothing added to any logit. What it adds to the means is
unmerged to the tokens. Nothing of this is shared with tomesd.
"""

import pytest
import torch
from torch import Tensor

import tomesd
from tests.support.dit_blocks import (
    FAMILIES,
    WITHOUT_PROPORTIONAL,
    calls,
    grid,
    grouped,
    image,
    places,
    tokens,
    tokens_of,
)
from tests.support.tiny_transformers import TINY, TinyTransformer

RATIO = 0.4
PROPORTIONAL = sorted(set(FAMILIES) - WITHOUT_PROPORTIONAL)


def _where(tiny: TinyTransformer, value: Tensor) -> tuple[int, slice] | None:
    # Wan has its timesteps by token and branch, SkyReels by branch and token.
    return tokens_of(tiny, value, (1, 0, 2) if value.dim() == 4 else (1, 0))


def _levelled(tiny: TinyTransformer, value: Tensor, groups: list, is_state: bool) -> Tensor:
    """Means of groups for token states, the head's entry for everything else."""
    where = _where(tiny, value)
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


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_a_patched_block_attends_to_merged_tokens_as_the_hosts_own_to_equal_tokens(name):
    tiny = FAMILIES[name]
    model, found = calls(tiny, ratio=RATIO, window=0)
    outputs = [call() for call in found]
    tomesd.remove_patch(model)
    for call, got in zip(found, outputs, strict=True):
        x, stream = image(tiny, call), call.tokens
        groups = grouped(tiny, x, RATIO)
        levelled = call.without_place().changed(
            lambda value, groups=groups, stream=stream: _levelled(
                tiny, value, groups, is_state=value is stream
            )
        )
        means = image(tiny, levelled)
        want = levelled()
        assert any(len(group) > 1 for sample in groups for group in sample)
        for y, reference in zip(got, want, strict=True):
            if y is None:
                assert reference is None
                continue
            if y.shape[1] >= tokens(tiny):
                reference[:, places(tiny, y.shape[1])] += x - means
            # Sizes and their logarithms are float32.
            torch.testing.assert_close(y, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_merging_one_pair_of_identical_tokens_changes_nothing(name):
    tiny = FAMILIES[name]
    h, w = grid(tiny)
    twin, of = 1, 0  # A source and the destination of its cell.

    def twinned(value: Tensor) -> Tensor:
        where = _where(tiny, value)
        if where is None:
            return value
        dim, own = where
        value = value.clone()
        rows = value.movedim(dim, 0)[own]
        for first in range(0, tokens(tiny), h * w):
            rows[first + twin] = rows[first + of]
        return value

    # One token merges in each picture or frame.
    model, found = calls(tiny, ratio=1 / (h * w))
    found = [call.changed(twinned) for call in found]
    merged = [call() for call in found]
    for hooks in model._tomesd_patch.blocks.values():
        assert hooks.counts[:2] == (tokens(tiny), tokens(tiny) - tiny.frames)
    tomesd.remove_patch(model)
    for call, got in zip(found, merged, strict=True):
        for y, want in zip(got, call.without_place()(), strict=True):
            if y is not None:
                torch.testing.assert_close(y, want, rtol=0, atol=1e-6)


TOGETHER = {
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "Krea2Transformer2DModel",
    "Lumina2Transformer2DModel",
    "OmniGenTransformer2DModel",
    "ZImageTransformer2DModel",
}


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_a_text_token_never_merges(name):
    """However alike they are: in one stream with the image's."""
    tiny = TINY[name]
    model, found = calls(tiny, ratio=0.5)
    single = found[-1].changed(lambda value: torch.ones_like(value) if value.dim() == 3 else value)
    maps = []
    hooks = model._tomesd_patch.blocks[single.block]
    single.block.register_forward_pre_hook(lambda *_: maps.append(hooks.model.state.map))
    single()
    (token_map,) = maps
    of_grid = set(range(token_map.n)[places(tiny, token_map.n)])
    assert len(of_grid) == 40 < token_map.n
    for group, size in zip(token_map.group.tolist(), token_map.size[..., 0].tolist(), strict=True):
        of_image = {group[token] for token in of_grid}
        of_text = [group[token] for token in range(token_map.n) if token not in of_grid]
        assert len(of_image) == 20
        assert len(of_text) == len(set(of_text))
        assert of_image.isdisjoint(of_text)
        assert all(size[token] == 1 for token in of_text)
