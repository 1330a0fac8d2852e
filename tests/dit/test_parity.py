"""A patched block computes what the host's own computes on merged tokens, added to every token.

The reference matches and merges with plain loops: a group is the mean of its tokens at the place of
its head, and everything else that has an entry for each token keeps the head's. The unpatched
block is called on these, and what it adds to a group is added to each of its tokens. Proportional
attention is off, or the host has no use for it: `test_dit_reference` is about that.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from torch import Tensor, nn

import tomesd
from tests.support.dit_blocks import (
    FAMILIES,
    WITHOUT_PROPORTIONAL,
    calls,
    grouped,
    image,
    tokens,
    tokens_of,
)
from tests.support.tiny_transformers import TEXT_TOKENS, TinyTransformer

RATIO = 0.4
# AuraFlow has registers beside its text, and HiDream three texts.
TEXTS = (TEXT_TOKENS, TEXT_TOKENS + 8, 3 * TEXT_TOKENS)
Groups = list[list[list[int]]]


def _merged(tiny: TinyTransformer, value: Tensor, groups: Groups, is_state: bool) -> Tensor:
    """One row for each group, where there was one for each image token."""
    # A mask of keys has them in its last dimension; Wan's timesteps by token and branch, which may
    # be in either order.
    where = tokens_of(tiny, value, (1, 0, 2, -1) if value.dim() >= 4 else (1, 0))
    if where is None:
        return value
    dim, own = where
    if dim == 0:
        return _rows(value, own, groups[0], is_state)
    # Latte's frames are samples.
    value = value.expand(len(groups), *value.shape[1:])
    samples = [
        _rows(sample.movedim(dim - 1, 0), own, of_sample, is_state).movedim(0, dim - 1)
        for sample, of_sample in zip(value, groups, strict=True)
    ]
    merged = torch.stack(samples)
    if dim == 2 and value.shape[2:] == (value.shape[2],) * 2:  # A mask of all pairs.
        return _merged(tiny, merged.mT, groups, is_state).mT
    return merged


def _rows(table: Tensor, own: slice, groups: list[list[int]], is_state: bool) -> Tensor:
    rows = table[own]
    merged = [rows[group].mean(0) if is_state else rows[group[0]] for group in groups]
    return torch.cat([table[: own.start or 0], torch.stack(merged), table[own.stop :]])


def _each_its_groups(
    tiny: TinyTransformer, y: Tensor, groups: Groups, before: Tensor, x: Tensor
) -> Tensor:
    """What the block added to each group, added to the group's tokens."""
    m = len(groups[0])
    start = 0 if tiny.image_first else y.shape[1] - m
    rows = torch.empty_like(x)
    for sample, of_sample in enumerate(groups):
        for index, group in enumerate(of_sample):
            added = y[sample, start + index] - before[sample, start + index]
            for token in group:
                rows[sample, token] = x[sample, token] + added
    return torch.cat([y[:, :start], rows, y[:, start + m :]], dim=1)


def _check(name: str, change: Callable[[nn.Module], None] | None = None) -> list[Tensor]:
    """Every block, with something done to the model before. Returns what they gave."""
    tiny = FAMILIES[name]
    off = {} if name in WITHOUT_PROPORTIONAL else {"prop_attn": False}
    model, found = calls(tiny, ratio=RATIO, window=0, **off)
    if change is not None:
        change(model)
    outputs = [call() for call in found]
    tomesd.remove_patch(model)
    for call, got in zip(found, outputs, strict=True):
        x, stream = image(tiny, call), call.tokens
        groups = grouped(tiny, x, RATIO)
        m = len(groups[0])
        assert m == tokens(tiny) - tiny.frames * int(RATIO * tokens(tiny) / tiny.frames)
        merged = call.without_place().changed(
            lambda value, groups=groups, stream=stream: _merged(
                tiny, value, groups, is_state=value is stream
            )
        )
        for y, reference in zip(got, merged(), strict=True):
            if y is None:
                assert reference is None
                continue
            if reference.shape[1] >= m:
                reference = _each_its_groups(tiny, reference, groups, merged.tokens, x)
            torch.testing.assert_close(y, reference, rtol=0, atol=1e-9)
    return [y for output in outputs for y in output if y is not None]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_patched_block_adds_to_each_token_what_the_hosts_own_adds_to_its_group(name):
    _check(name)


# Those of whose attention the host knows how to skip it, or its scores.
SKIPPED = {
    "attention": ("PixArt", "Latte", "CogView4"),
    "scores": ("PixArt", "Latte", "CogView4", "QwenImage", "HunyuanImage"),
    "feed-forward": ("SD3", "Flux", "PixArt", "Wan", "LTXVideo", "CogVideoX", "Mochi"),
}
WHAT = {
    "attention": {"skip_ff": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "feed-forward": {"skip_attention": False},
}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (what, name)
        for what, kinds in SKIPPED.items()
        for name in sorted(FAMILIES)
        if name.partition("Transformer")[0] in kinds
    ],
)
def test_what_guidance_skips_in_a_block_is_skipped_of_merged_tokens(what, name):
    """As guiders do: skip-layer, perturbed-attention and auto-guidance."""

    def change(model) -> None:
        for where, blocks in model.named_children():
            if where in ("blocks", "transformer_blocks"):
                layers = LayerSkipConfig(list(range(len(blocks))), fqn=where, **WHAT[what])
                apply_layer_skip(model, layers)

    outputs = zip(_check(name), _check(name, change), strict=True)
    assert any(not torch.equal(whole, skipped) for whole, skipped in outputs)


@pytest.mark.parametrize("name", sorted(WITHOUT_PROPORTIONAL))
def test_without_proportional_attention_merging_pairs_of_equal_tokens_is_reading_the_text_twice(
    name,
):
    """A pair then counts as one key. So it does beside one text, as two do beside two."""
    tiny = FAMILIES[name]
    n = tokens(tiny)

    def paired(value: Tensor) -> Tensor:
        """Every second token is the one before it."""
        where = tokens_of(tiny, value, (1, 0, 2) if value.dim() >= 4 else (1, 0))
        if where is None:
            return value
        dim, own = where
        value = value.clone()
        rows = value.movedim(dim, 0)[own]
        rows[1::2] = rows[::2]
        return value

    def twice(value: Tensor) -> Tensor:
        """Every text token is there twice, in a row: padded ones stay at the end."""
        where = tokens_of(tiny, value, (1, 0))
        if where is not None:
            dim, own = where
            before, rest = own.start or 0, value.shape[dim] - own.stop
            counts = torch.tensor([2] * before + [1] * n + [2] * rest)
            return value.repeat_interleave(counts, dim)
        for dim in (1, 0):
            if value.dim() > dim and value.shape[dim] in TEXTS:
                return value.repeat_interleave(2, dim)
        return value

    model, found = calls(tiny, ratio=0.5, sx=2, sy=1, window=0)
    found = [call.changed(paired) for call in found]
    outputs = [call() for call in found]
    for hooks in model._tomesd_patch.blocks.values():
        assert hooks.counts[:2] == (n, n // 2)
    tomesd.remove_patch(model)
    for call, got in zip(found, outputs, strict=True):
        for y, want in zip(got, call.without_place().changed(twice)(), strict=True):
            if y is not None:
                torch.testing.assert_close(twice(y), want, rtol=0, atol=1e-9)
