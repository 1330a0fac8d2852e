"""Ways to merge that are only measured do what they are measured for."""

import pytest
import torch

from benchmarks.frontier.candidates import FAMILIES, Candidate
from benchmarks.frontier.matchers import (
    MATCHED_ON,
    GridSettings,
    KeptSettings,
    LateSettings,
    MatchedSettings,
    RunSettings,
    install,
)
from benchmarks.pictures.sampling import Sampling, sample
from tests.support.tiny_models import scheduler, sd_pipeline, sd_unet, unet_inputs
from tests.support.tiny_shapes import untrained_pipeline
from tomesd import RatioSchedule, patched
from tomesd.diffusion.settings import DiffusionSettings

HOW = Sampling(steps=5, guidance=3.0, width=32, height=32)


@pytest.fixture(scope="module")
def pipe():
    pipe = untrained_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many tokens each map that is made is of."""
    found = []
    usual = DiffusionSettings.token_map

    def counting(self, features, h, w, key):
        found.append(h * w)
        return usual(self, features, h, w, key)

    monkeypatch.setattr(DiffusionSettings, "token_map", counting)
    return found


@torch.no_grad()
def predict(unet) -> torch.Tensor:
    return unet(**unet_inputs(unet)).sample


@pytest.mark.parametrize(("pools", "h", "w"), [(False, 4, 6), (True, 4, 6), (True, 5, 7)])
def test_a_grid_keeps_one_token_of_each_cell(pools, h, w):
    settings = GridSettings(ratio=0.75, merge_block=False, merge_queries=False, pools=pools)
    x = torch.randn(2, h * w, 3, dtype=torch.float64)
    got = settings.token_map(x, h, w, None).merge(x)
    cells = [
        [y * w + x for y in range(top, min(top + 2, h)) for x in range(left, min(left + 2, w))]
        for top in range(0, h, 2)
        for left in range(0, w, 2)
    ]
    wanted = [x[:, cell].mean(1) if pools else x[:, cell[0]] for cell in cells]
    torch.testing.assert_close(got, torch.stack(wanted, 1))
    assert settings.merged(h, w) == h * w - len(cells)


def test_a_map_kept_for_one_step_is_no_other_than_the_usual_one():
    unet = sd_unet()
    settings = DiffusionSettings(ratio=0.5)
    outputs = []
    for chosen in (settings, KeptSettings(ratio=0.5, steps=1)):
        patch = install(unet, chosen)
        outputs.append(predict(unet))
        patch.remove()
    assert torch.equal(*outputs)


def test_kept_maps_are_made_every_few_steps_and_anew_for_each_picture(pipe, made):
    kept = Candidate("kept", KeptSettings(ratio=0.5, steps=2), FAMILIES[1])
    prompts = ["a red heart", "a blue star"]
    with kept.patched(pipe):
        both = list(sample(pipe, prompts, [0, 1], HOW))
    # Five steps make maps three times in each of the finest level's three blocks.
    assert len(made) == 2 * 3 * 3
    with kept.patched(pipe):
        (alone,) = sample(pipe, prompts[1:], [1], HOW)
    assert alone.tobytes() == both[1].tobytes()


@torch.no_grad()
def test_a_run_of_blocks_is_merged_once_and_what_it_adds_is_given_back(made):
    """Against blocks called one after another on merged tokens, with one merge and unmerge."""
    unet = sd_unet(transformer_layers_per_block=3)
    transformer = unet.down_blocks[0].attentions[0]
    blocks = transformer.transformer_blocks
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    seen = {}

    def enters(block, args, kwargs):
        seen["x"] = args[0]

    def leaves(block, args, output):
        seen["output"] = output

    # The one before the patch's own hook, the other after it: both see every token.
    first = blocks[0].register_forward_pre_hook(enters, with_kwargs=True)
    patch = install(unet, RunSettings(ratio=0.5, prop_attn=False))
    last = blocks[-1].register_forward_hook(leaves)
    transformer(torch.randn(2, transformer.in_channels, 4, 6), encoder_hidden_states=text)
    for each in (first, last, patch):
        each.remove()
    assert made == [24]

    token_map = DiffusionSettings(ratio=0.5).token_map(seen["x"], 4, 6, None)
    merged = after = token_map.merge(seen["x"])
    for block in blocks:
        after = block(after, encoder_hidden_states=text)
    wanted = seen["x"] + token_map.unmerge(after - merged)
    torch.testing.assert_close(seen["output"], wanted)


def test_each_forward_begins_its_runs_anew(made):
    unet = sd_unet(transformer_layers_per_block=2)
    patch = install(unet, RunSettings(ratio=0.5))
    first, per_forward = predict(unet), len(made)
    again = predict(unet)
    patch.remove()
    assert per_forward == sum(not each.skipped for each in patch.transformers)
    assert len(made) == 2 * per_forward
    assert torch.equal(first, again)


@pytest.mark.parametrize("on", MATCHED_ON)
def test_matching_on_less_still_finds_what_is_alike(on):
    # The tokens of a cell are equal, and unlike those of all other cells in every quarter.
    cells = torch.arange(6).view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    x = torch.eye(6).repeat_interleave(4, 1)[cells.flatten()].repeat(4, 1, 1)
    token_map = MatchedSettings(ratio=0.5, on=on).token_map(x, 4, 6, None)
    assert token_map.group.shape == (4, 24)
    assert token_map.size.shape == (4, 12, 1)
    torch.testing.assert_close(token_map.unmerge(token_map.merge(x)), x)


def test_both_halves_of_the_guidance_get_the_map_of_their_mean():
    halves = torch.randn(2, 3, 24, 8)
    settings = MatchedSettings(ratio=0.5, on="the mean of both guidance halves")
    token_map = settings.token_map(halves.flatten(0, 1), 4, 6, None)
    wanted = DiffusionSettings(ratio=0.5).token_map(halves.mean(0), 4, 6, None)
    for half in token_map.group.chunk(2):
        assert torch.equal(half, wanted.group)


def test_late_settings_are_the_products_own_schedule():
    pipe = sd_pipeline()
    pipe.scheduler = scheduler()
    pipe.set_progress_bar_config(disable=True)
    late = Candidate("late", LateSettings(ratio=0.5, since=0.4), FAMILIES[1])
    with late.patched(pipe):
        (got,) = sample(pipe, ["a cat"], [0], HOW)
    with patched(pipe, ratio=RatioSchedule.last(0.5, since=0.4)):
        (wanted,) = sample(pipe, ["a cat"], [0], HOW)
    (unpatched,) = sample(pipe, ["a cat"], [0], HOW)
    assert got.tobytes() == wanted.tobytes() != unpatched.tobytes()
