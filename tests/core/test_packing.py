"""Maps of packed sequences do what the maps of the single ones do."""

import torch

from tomesd.core.packing import packed, with_tail
from tomesd.core.token_map import TokenMap


def maps() -> list[TokenMap]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch, n, count in ((2, 7, 3), (1, 5, 0), (3, 4, 2)):
        order = torch.rand(batch, n, generator=generator).argsort(1)
        found.append(TokenMap.from_moves(n, order[:, :count], order[:, -1:].expand(-1, count)))
    return found


def test_a_packed_map_merges_and_unmerges_each_sequence_as_its_own_map_does():
    singles = maps()
    inputs = [torch.randn(each.size.shape[0], each.n, 3) for each in singles]
    joint = packed(singles)
    whole = torch.cat([x.flatten(0, 1) for x in inputs])[None]
    few = [each.merge(x) for each, x in zip(singles, inputs, strict=True)]
    assert torch.equal(joint.merge(whole), torch.cat([x.flatten(0, 1) for x in few])[None])
    back = [each.unmerge(x) for each, x in zip(singles, few, strict=True)]
    want = torch.cat([x.flatten(0, 1) for x in back])[None]
    assert torch.equal(joint.unmerge(joint.merge(whole)), want)
    assert torch.equal(joint.size[0], torch.cat([each.size.flatten(0, 1) for each in singles]))


def test_a_tail_stays_as_it_is():
    for each in maps():
        x = torch.randn(each.size.shape[0], each.n + 2, 3)
        longer = with_tail(each, 2)
        want = torch.cat([each.merge(x[:, :-2]), x[:, -2:]], 1)
        assert torch.equal(longer.merge(x), want)
        want = torch.cat([each.unmerge(each.merge(x[:, :-2])), x[:, -2:]], 1)
        assert torch.equal(longer.unmerge(longer.merge(x)), want)
