"""Where chance decides, it is a pure function of seed, timestep and block."""

import pytest
import torch

import tomesd
from tests.support.tiny_unets import predict, sd_unet, sdxl_unet, unet_inputs
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.matcher import Matcher

RANDOM = [
    {"use_rand": True},
    {"method": "prune"},
    {"use_rand": True, "merge_queries": False, "ratio": 0.75},
]


@pytest.fixture
def maps(monkeypatch) -> list[TokenMap]:
    """The token maps that are made while a test runs, in order."""
    made = []
    make = Matcher.token_map

    def record(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(Matcher, "token_map", record)
    return made


@pytest.mark.parametrize("settings", RANDOM, ids=str)
def test_it_depends_on_the_seed(settings):
    first, second, again = (
        predict(tomesd.apply_patch(sd_unet(), seed=seed, **settings)) for seed in (0, 1, 0)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_without_randomness_the_seed_does_not_matter():
    first, second = (predict(tomesd.apply_patch(sd_unet(), seed=seed)) for seed in (0, 1))
    assert torch.equal(first, second)


def test_random_destinations_differ_from_the_fixed_ones():
    fixed = predict(tomesd.apply_patch(sd_unet()))
    assert not torch.equal(predict(tomesd.apply_patch(sd_unet(), use_rand=True)), fixed)


def test_by_default_every_step_and_block_has_the_same_destinations(maps):
    unet = tomesd.apply_patch(sd_unet(), ratio=0.75)
    for timestep in (900, 100):
        predict(unet, timestep=torch.tensor(timestep), batch=1, h=8, w=8)
    top_left = {8 * y + x for y in range(0, 8, 2) for x in range(0, 8, 2)}
    # At the largest ratio only the destinations are left.
    assert all(set(made.head[0].tolist()) == top_left for made in maps)


def test_another_timestep_or_block_has_other_destinations(maps):
    unet = tomesd.apply_patch(sd_unet(), ratio=0.75, use_rand=True)
    for timestep in (900, 100, 900):
        predict(unet, timestep=torch.tensor(timestep), batch=1, h=8, w=8)
    # Three blocks at the finest level, three steps.
    heads = [tuple(made.head[0].tolist()) for made in maps]
    first, second, again = heads[:3], heads[3:6], heads[6:]
    assert first == again
    assert len(set(first + second)) == 6
    for chosen in heads:
        cells = {(token // 8 // 2, token % 8 // 2) for token in chosen}
        assert len(cells) == len(chosen) == 16


@pytest.mark.parametrize("settings", RANDOM, ids=str)
@pytest.mark.parametrize("build", [sd_unet, sdxl_unet])
def test_both_halves_of_a_guidance_batch_share_the_partition(maps, build, settings):
    unet = tomesd.apply_patch(build(), **settings)
    inputs = unet_inputs(unet, batch=4)
    inputs["sample"] = inputs["sample"][:2].repeat(2, 1, 1, 1)
    with torch.no_grad():
        unet(**inputs)
    for made in maps:
        if settings.get("method") == "prune" or settings.get("ratio") == 0.75:
            # Nothing but the destinations is left, or what was not dropped: the same in all.
            assert all(torch.equal(head, made.head[0]) for head in made.head)
        else:
            # Which sources merge, and where, is each sample's own affair; but what is a
            # destination in one is a source in none.
            many = made.size.squeeze(-1) > 1
            pairs = zip(made.head, many, strict=True)
            destinations = {token for head, kept in pairs for token in head[kept].tolist()}
            assert not destinations & set(made.moved.flatten().tolist())


def test_a_unet_for_one_half_at_a_time_gives_the_same_halves():
    unet = tomesd.apply_patch(sd_unet(), use_rand=True, merge_mlp=True, max_downsample=8)
    inputs = unet_inputs(unet, batch=2)
    with torch.no_grad():
        together = unet(**inputs).sample
        halves = [
            unet(
                inputs["sample"][i : i + 1],
                inputs["timestep"],
                inputs["encoder_hidden_states"][i : i + 1],
            ).sample
            for i in range(2)
        ]
    torch.testing.assert_close(torch.cat(halves), together, rtol=0, atol=1e-5)


def test_pruned_tokens_get_nothing_from_the_branch(maps):
    unet = tomesd.apply_patch(sd_unet(), ratio=0.3, method="prune", merge_attn=True)
    outputs = []
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    predict(unet)
    dropped = maps[0].group < 0
    assert dropped.sum(1).tolist() == [42, 42]
    assert torch.equal(outputs[0].abs().sum(-1) == 0, dropped)


@pytest.mark.parametrize("ratio", [0.6, 0.8, 0.95])
def test_pruning_may_go_beyond_what_a_partition_allows(ratio):
    unet = tomesd.apply_patch(sd_unet(), ratio=ratio, method="prune")
    assert predict(unet).isfinite().all()
    (rows,) = tomesd.report(unet).rows.values()
    assert rows[0].merged == 140 - int(ratio * 140)
