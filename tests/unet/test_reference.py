"""A patched UNet computes what one computes whose blocks are written out by hand, with loops."""

import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import tomesd
from tests.support.recorders import RecordingProcessor
from tests.support.tiny_unets import predict, sd_unet, sdxl_unet

# The token grid of each level, for latents of 10×14, which neither level nor stride divides.
GRIDS = {10 * 14: (10, 14), 5 * 7: (5, 7), 3 * 4: (3, 4)}

# The plain recipe; each test says how it differs.
RECIPE = {
    "ratio": 0.5,
    "alternating": False,
    "levels": (10 * 14,),
    "attn": True,
    "crossattn": False,
    "mlp": False,
    "merge_queries": True,
    "block": False,
    "prop_attn": False,
    "keep_norm": True,
    "refine": 0,
}


def _groups(features: Tensor, recipe: SimpleNamespace) -> list[list[int]]:
    """The groups of one sample's tokens [N, C], each destination first: match once, merge r."""
    n = len(features)
    h, w = GRIDS[n]
    if recipe.alternating:
        destinations = list(range(1, n, 2))
    else:  # The top left token of each 2×2 cell.
        destinations = [y * w + x for y in range(0, h, 2) for x in range(0, w, 2)]
    directions = features / features.norm(dim=1, keepdim=True)
    similarity = directions @ directions.T
    sources = [token for token in range(n) if token not in destinations]
    for _ in range(1 + recipe.refine):
        nearest = {s: max(destinations, key=similarity[s].tolist().__getitem__) for s in sources}
        edges = [(similarity[s, d].item(), s, d) for s, d in nearest.items()]
        groups = directions.clone()
        for source, destination in nearest.items():
            groups[destination] += directions[source]
        similarity = directions @ (groups / groups.norm(dim=1, keepdim=True)).T
    edges.sort(reverse=True)
    target = {source: destination for _, source, destination in edges[: int(recipe.ratio * n)]}
    return [
        [head] + [source for source, destination in target.items() if destination == head]
        for head in range(n)
        if head not in target
    ]


def _matrices(x: Tensor, recipe: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merging and heads [B, M, N], unmerging [B, N, M] and sizes [B, M], as dense matrices."""
    merge, heads, unmerge, sizes = [], [], [], []
    for sample in x:
        groups = _groups(sample, recipe)
        heads.append(torch.eye(len(sample), dtype=x.dtype)[[group[0] for group in groups]])
        member = torch.zeros(len(groups), len(sample), dtype=x.dtype)
        for index, group in enumerate(groups):
            member[index, group] = 1
        size = member.sum(1)
        merge.append(member / size[:, None])
        unmerge.append(member.T)
        sizes.append(size)
    return torch.stack(merge), torch.stack(heads), torch.stack(unmerge), torch.stack(sizes)


def _attention(attn, queries: Tensor, tokens: Tensor, size: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d + log s) V"""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = heads(attn.to_q(queries)), heads(attn.to_k(tokens)), heads(attn.to_v(tokens))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if size is not None:
        logits = logits + size.log()[:, None, None, :]
    return attn.to_out[0]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _forward(block, recipe: SimpleNamespace, x: Tensor, encoder_hidden_states: Tensor, **_):
    """A transformer block: match once on its input; merge → compute → unmerge in each branch."""
    merges = x.shape[1] in recipe.levels
    if merges:
        mean, heads, unmerge, size = _matrices(x, recipe)

        def merge(y: Tensor) -> Tensor:
            if not recipe.keep_norm:
                return mean @ y
            length = (heads @ y).norm(dim=-1) / (mean @ y).norm(dim=-1)
            return length[..., None] * (mean @ y)

        if recipe.block:
            y = mean @ x
            size = size if recipe.prop_attn else None
            z = y + _attention(block.attn1, block.norm1(y), block.norm1(y), size)
            z = z + _attention(block.attn2, block.norm2(z), encoder_hidden_states)
            z = z + block.ff(block.norm3(z))
            return x + unmerge @ (z - y)

    y = block.norm1(x)
    if merges and recipe.attn:
        size = size if recipe.prop_attn else None
        if recipe.merge_queries:
            y = unmerge @ _attention(block.attn1, merge(y), merge(y), size)
        else:
            y = _attention(block.attn1, y, merge(y), size)
    else:
        y = _attention(block.attn1, y, y)
    x = x + y

    y = block.norm2(x)
    if merges and recipe.crossattn:
        y = unmerge @ _attention(block.attn2, merge(y), encoder_hidden_states)
    else:
        y = _attention(block.attn2, y, encoder_hidden_states)
    x = x + y

    y = block.norm3(x)
    y = unmerge @ block.ff(merge(y)) if merges and recipe.mlp else block.ff(y)
    return x + y


def _written_out(unet, **recipe):
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.forward = partial(_forward, module, SimpleNamespace(**RECIPE | recipe))
    return unet


CASES = {
    "self-attention": (
        {"merge_attn": True, "prop_attn": False},
        {},
    ),
    "a ratio below what the partition allows": (
        {"merge_attn": True, "ratio": 0.2, "prop_attn": False},
        {"ratio": 0.2},
    ),
    "proportional attention": (
        {"merge_attn": True},
        {"prop_attn": True},
    ),
    "the whole block": (
        {},
        {"block": True, "prop_attn": True},
    ),
    "the whole block, every level, no proportional attention": (
        {"prop_attn": False, "max_downsample": 4, "ratio": 0.3},
        {"block": True, "levels": tuple(GRIDS), "ratio": 0.3},
    ),
    "keys and values only": (
        {"merge_queries": False, "prop_attn": False},
        {"merge_queries": False},
    ),
    "keys and values only, proportional attention": (
        {"merge_queries": False, "prop_attn": True, "ratio": 0.75},
        {"merge_queries": False, "prop_attn": True, "ratio": 0.75},
    ),
    "cross-attention": (
        {"merge_crossattn": True, "prop_attn": False},
        {"crossattn": True},
    ),
    "MLP": (
        {"merge_mlp": True, "prop_attn": False},
        {"mlp": True},
    ),
    "MLP alone": (
        {"merge_attn": False, "merge_mlp": True},
        {"attn": False, "mlp": True},
    ),
    "plain means": (
        {"merge_attn": True, "keep_norm": False},
        {"prop_attn": True, "keep_norm": False},
    ),
    "refined groups": (
        {"merge_attn": True, "ratio": 0.4, "refine": 2},
        {"prop_attn": True, "ratio": 0.4, "refine": 2},
    ),
    "merged blocks with refined groups": (
        {"refine": 1},
        {"block": True, "prop_attn": True, "refine": 1},
    ),
    "every level": (
        {"merge_attn": True, "max_downsample": 4, "prop_attn": True},
        {"levels": tuple(GRIDS), "prop_attn": True},
    ),
    "all branches, every level, proportional attention": (
        {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 4, "prop_attn": True},
        {"crossattn": True, "mlp": True, "levels": tuple(GRIDS), "prop_attn": True},
    ),
    "the paper's Appendix F": (
        {"preset": "paper"},
        {
            "alternating": True,
            "crossattn": True,
            "mlp": True,
            "levels": tuple(GRIDS),
            "keep_norm": False,
        },
    ),
    "the paper's Appendix F at a lower ratio": (
        {"preset": "paper", "ratio": 0.3},
        {
            "alternating": True,
            "crossattn": True,
            "mlp": True,
            "levels": tuple(GRIDS),
            "ratio": 0.3,
            "keep_norm": False,
        },
    ),
}


def test_the_written_out_blocks_are_the_models_own_where_nothing_merges():
    expected = predict(sd_unet().double())
    written_out = predict(_written_out(sd_unet().double(), levels=()))
    torch.testing.assert_close(written_out, expected, rtol=0, atol=1e-10)


@cache
def _patched(case: str) -> Tensor:
    return predict(tomesd.apply_patch(sd_unet().double(), **CASES[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_a_patched_unet_equals_one_whose_blocks_are_written_out(case):
    expected = predict(_written_out(sd_unet().double(), **CASES[case][1]))
    # Sizes and their logarithms are float32.
    torch.testing.assert_close(_patched(case), expected, rtol=0, atol=1e-7)
    # The reference tells this case from every other one.
    others = [(_patched(other) - expected).abs().max() for other in CASES if other != case]
    assert min(others) > 1e-5


def test_several_blocks_in_a_transformer_match_anew_in_each():
    recipe = {"levels": (5 * 7,), "prop_attn": True, "mlp": True}
    expected = predict(_written_out(sdxl_unet().double(), **recipe))
    unet = tomesd.apply_patch(sdxl_unet().double(), ratio=0.5, prop_attn=True, merge_mlp=True)
    torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-7)


def test_the_written_out_blocks_agree_in_single_precision_too():
    expected = predict(_written_out(sd_unet(), prop_attn=True))
    patched = predict(tomesd.apply_patch(sd_unet(), ratio=0.5, merge_attn=True))
    torch.testing.assert_close(patched, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", [None, "paper"])
def test_proportional_attention_is_on_by_default_and_off_in_the_papers_preset(preset):
    default = predict(tomesd.apply_patch(sd_unet(), preset=preset))
    on = predict(tomesd.apply_patch(sd_unet(), preset=preset, prop_attn=True))
    assert torch.equal(default, on) == (preset is None)


def test_what_is_given_beside_a_preset_wins():
    given = predict(tomesd.apply_patch(sd_unet(), preset="paper", merge_mlp=False))
    recipe = {"alternating": True, "crossattn": True, "levels": tuple(GRIDS), "keep_norm": False}
    by_hand = _written_out(sd_unet(), **recipe)
    torch.testing.assert_close(given, predict(by_hand), rtol=0, atol=1e-5)


def _seen(unet, **settings) -> dict[str, list[tuple[int, int]]]:
    """How many tokens the projections of each kind are given in one forward pass."""
    seen: dict[str, list] = {"to_q": [], "to_k": [], "to_v": [], "cross": [], "mlp": []}
    for name, module in tomesd.apply_patch(unet, **settings).named_modules():
        kind = name.rpartition(".")[-1]
        if "attn1" in name and kind in seen:
            module.register_forward_hook(lambda _, x, y, k=kind: seen[k].append(x[0].shape[1]))
        if name.endswith("attn2.to_q"):
            module.register_forward_hook(lambda _, x, y: seen["cross"].append(x[0].shape[1]))
        if name.endswith("ff.net.0"):
            module.register_forward_hook(lambda _, x, y: seen["mlp"].append(x[0].shape[1]))
    predict(unet)
    return seen


@pytest.mark.parametrize(
    ("settings", "merged"),
    [
        ({}, {"to_q", "to_k", "to_v", "cross", "mlp"}),
        ({"merge_attn": True}, {"to_q", "to_k", "to_v"}),
        ({"merge_attn": True, "method": "prune"}, {"to_q", "to_k", "to_v"}),
        ({"merge_queries": False}, {"to_k", "to_v"}),
        ({"merge_attn": False, "merge_crossattn": True}, {"cross"}),
        ({"merge_mlp": True}, {"to_q", "to_k", "to_v", "mlp"}),
        ({"preset": "paper", "max_downsample": 1}, {"to_q", "to_k", "to_v", "cross", "mlp"}),
    ],
    # In order: tests that run side by side must have the same names everywhere.
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
@pytest.mark.parametrize(("ratio", "left"), [(0.5, 70), (0.25, 105)])
def test_the_merged_branches_compute_on_fewer_tokens_and_no_others_do(
    settings, merged, ratio, left
):
    # Down, down (coarser), middle, up (coarser) twice, up twice.
    everything = [140, 35, 12, 35, 35, 140, 140]
    reduced = [left if tokens == 140 else tokens for tokens in everything]
    for branch, tokens in _seen(sd_unet(), ratio=ratio, **settings).items():
        assert tokens == (reduced if branch in merged else everything), branch


@pytest.mark.parametrize(
    ("settings", "expected"),
    # A processor that is not known may take keys that it is given for those of a text.
    [({"ratio": 0.5}, (70, 70)), ({"ratio": 0.75, "merge_queries": False}, (140, 140))],
    ids=str,
)
def test_a_users_own_attention_processor_sees_the_merged_tokens(settings, expected):
    unet = sd_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.set_processor(RecordingProcessor(attn.processor))
    predict(tomesd.apply_patch(unet, **settings))
    assert attn.processor.seen == [expected]
