"""Every kind of UNet: its spatial blocks compute what the host's own do on merged tokens.

Each block is called directly, with the arguments that its model gives it. The reference matches and
merges with plain loops, calls the unpatched block, and adds to every token what that adds to its
group.
"""

import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests.support import slow_reference
from tests.support.tiny_unets import TINY

H, W = 6, 10
N = H * W
RATIO = 0.4
WAYS = [
    {},
    {"merge_attn": True, "merge_crossattn": True, "merge_mlp": True},
    {"preset": "quality"},
]


def _calls(tiny, **settings) -> tuple[nn.Module, list[tuple[nn.Module, Tensor, dict]]]:
    """A patched model; its merging blocks, their tokens and their other arguments."""
    model = tomesd.apply_patch(tiny.build(), **settings)
    found = []

    def note(block, args, kwargs) -> None:
        given = {"hidden_states": args[0]} if args else {}
        given |= kwargs
        given = {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        found.append((block, given.pop("hidden_states"), given))

    blocks = list(model._tomesd_patch.blocks)
    handles = [
        block.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for block in blocks
    ]
    with torch.no_grad():
        tiny.call(model, h=H, w=W)
    for handle in handles:
        handle.remove()
    assert len(found) == len(blocks) > 0
    return model.double(), found


def _without_place(given: dict) -> dict:
    return {
        name: {key: each for key, each in value.items() if key != "tomesd_place"}
        if isinstance(value, dict)
        else value
        for name, value in given.items()
    }


def _groups(tokens: Tensor) -> list[list[int]]:
    destinations = [y * W + x for y in range(0, H, 2) for x in range(0, W, 2)]
    sources = [token for token in range(N) if token not in destinations]
    return slow_reference.bipartite_soft_matching(
        tokens.tolist(), sources, destinations, int(RATIO * N)
    )


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_block_adds_to_each_token_what_the_hosts_own_adds_to_its_group(name):
    model, found = _calls(TINY[name], ratio=RATIO, window=0, prop_attn=False)
    outputs = [block(x, **given) for block, x, given in found]
    tomesd.remove_patch(model)
    for (block, x, given), got in zip(found, outputs, strict=True):
        groups = [_groups(sample) for sample in x]
        merged = torch.stack(
            [
                torch.stack([sample[group].mean(0) for group in of_sample])
                for sample, of_sample in zip(x, groups, strict=True)
            ]
        )
        assert merged.shape[1] == N - int(RATIO * N)
        added = block(merged, **_without_place(given)) - merged
        want = x.clone()
        for sample, of_sample in enumerate(groups):
            for index, group in enumerate(of_sample):
                for token in group:
                    want[sample, token] += added[sample, index]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_merging_one_pair_of_identical_tokens_changes_nothing(name, settings):
    model, found = _calls(TINY[name], **settings | {"ratio": 1 / N})
    for _, x, _ in found:
        # A source and the destination of its cell.
        x[:, 1] = x[:, 0]
    seen: list[int] = []
    for block, _, _ in found:
        block.attn1.to_k.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    merged = [block(x, **given) for block, x, given in found]
    assert seen == [N - 1] * len(found)
    tomesd.remove_patch(model)
    for (block, x, given), got in zip(found, merged, strict=True):
        torch.testing.assert_close(got, block(x, **_without_place(given)), rtol=0, atol=1e-6)
