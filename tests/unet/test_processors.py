"""Attention processors that are not diffusers' own: of its pipelines, or of the user.

They may take keys of another sample or another pass, keep attention maps, or read the mask in
their own way. Merging is right beside them if tokens that are equal merge without a change.
"""

import pytest
import torch
from diffusers import StableDiffusionSAGPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_zero
from diffusers.pipelines.ledits_pp import pipeline_leditspp_stable_diffusion as ledits
from torch import Tensor

import tomesd
from tests.support.recorders import RecordingProcessor, attention_lengths
from tests.support.tiny_model import WIDTH
from tests.support.tiny_pipelines import build_pipeline, sample, sd_components
from tests.support.tiny_unets import predict, sd_unet
from tomesd.diffusion.block import Place

WHERE = "down_blocks.0.attentions.0.transformer_blocks.0"
WAYS = [{}, {"merge_attn": True}, {"preset": "quality"}]
SIDE = 8


class _Own:
    """Attention without a mask whose keys and values a subclass exchanges."""

    def exchange(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        assert attention_mask is None
        is_cross = encoder_hidden_states is not None
        given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(given), attn.to_v(given)
        if not is_cross:
            key, value = self.exchange(key), self.exchange(value)
        query, key, value = (attn.head_to_batch_dim(each) for each in (query, key, value))
        y = attn.get_attention_scores(query, key) @ value
        return attn.to_out[0](attn.batch_to_head_dim(y))


class _FirstSamplesKeys(_Own):
    """Mutual self-attention, as MasaCtrl has it."""

    def exchange(self, x):
        return x[:1].expand_as(x)


class _FirstSamplesKeysToo(_Own):
    """Shared attention, as StyleAligned has it, and references that are concatenated."""

    def exchange(self, x):
        return torch.cat([x, x[:1].expand_as(x)], dim=1)


class _AllSamplesKeys(_Own):
    """Consistent self-attention."""

    def exchange(self, x):
        return x.flatten(0, 1).expand(len(x), -1, -1)


class _OtherOrder(_Own):
    def exchange(self, x):
        return x.flip(0)


OTHERS_KEYS = [
    pipeline_text_to_video_zero.CrossFrameAttnProcessor(2),
    pipeline_text_to_video_zero.CrossFrameAttnProcessor2_0(2),
    _FirstSamplesKeys(),
    _FirstSamplesKeysToo(),
    _AllSamplesKeys(),
    _OtherOrder(),
]


def _equal_tokens(seed: int, batch: int = 4, width: int = 16) -> Tensor:
    """[batch, SIDE², width]: in each sample half of the tokens are copies, elsewhere in each.

    A cell of 2×2 tokens has none, or three copies of its first one.
    """
    draw = torch.Generator().manual_seed(seed)
    cells = SIDE // 2
    x = torch.randn(batch, cells, 2, cells, 2, width, dtype=torch.float64, generator=draw)
    first = x[:, :, :1, :, :1].expand_as(x)
    count = cells * cells
    # 10 cells with three copies, and one with two: 32 of 64 tokens.
    kept = torch.stack([torch.randperm(count, generator=draw) for _ in range(batch)])
    rank = kept.argsort(1).view(batch, cells, 1, cells, 1, 1)
    last = torch.zeros(2, 2, dtype=torch.bool)
    last[1, 1] = True
    is_copy = (rank < 10) | ((rank == 10) & ~last.view(1, 1, 2, 1, 2, 1))
    return torch.where(is_copy, first, x).reshape(batch, SIDE * SIDE, width)


def _block(unet):
    return unet.double().get_submodule(WHERE)


def _run(block, x: Tensor, patched: bool) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    text = torch.randn(len(x), 5, WIDTH, dtype=torch.float64, generator=draw)
    own = {"tomesd_place": Place(((1, SIDE, SIDE),), 500)} if patched else {}
    with torch.no_grad():
        return block(x, encoder_hidden_states=text, cross_attention_kwargs=own)


def _same_as_unmerged(change, settings: dict, seeds=(0,)) -> dict:
    """Merge tokens that are equal in a block that was changed; how long attention was then."""
    plain, unet = (sd_unet() for _ in range(2))
    for each in (plain, unet):
        change(_block(each))
    tomesd.apply_patch(unet, ratio=0.5, **settings)
    for seed in seeds:
        x = _equal_tokens(seed)
        expected = _run(_block(plain), x, patched=False)
        with attention_lengths(unet) as lengths:
            got = _run(_block(unet), x, patched=True)
        torch.testing.assert_close(got, expected)
    return lengths


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("processor", OTHERS_KEYS, ids=lambda each: type(each).__name__)
def test_keys_of_another_sample_weigh_what_they_weigh_unmerged(processor, settings):
    lengths = _same_as_unmerged(lambda block: block.attn1.set_processor(processor), settings)
    # It would take keys that it is given for those of a text.
    left = 64 if settings.get("preset") else 32
    assert lengths[f"{WHERE}.attn1"] == (left, left)


class _KeysOfTheLastPass(_Own):
    """Reference attention: keys that an earlier pass left, of other merged tokens."""

    def __init__(self):
        self.kept: list[Tensor] = []

    def exchange(self, x):
        self.kept.append(x)
        return torch.cat([x, self.kept[-3]], dim=1) if len(self.kept) > 2 else x


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_keys_that_an_earlier_pass_left_weigh_what_they_weigh_unmerged(settings):
    _same_as_unmerged(
        lambda block: block.attn1.set_processor(_KeysOfTheLastPass()), settings, seeds=(0, 1)
    )


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_a_processor_may_read_a_mask_as_it_likes(settings):
    """As older ones do, by the number of queries; there is none."""

    class Padding(_Own):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            if attention_mask is not None:
                attention_mask.view(-1, 1, hidden_states.shape[1], hidden_states.shape[1])
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    _same_as_unmerged(lambda block: block.attn1.set_processor(Padding()), settings)


def test_the_report_says_where_keys_are_unmerged_and_what_is_left():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.5)
    unet.set_attn_processor(_Own())
    predict(unet)
    row = tomesd.report(unet).rows["UNet2DConditionModel"][0]
    assert (row.merged / row.tokens, row.work) == (0.5, 0.5)
    assert row.note == "keys unmerged for _Own"
    unet.set_attn_processor(AttnProcessor2_0())
    row = tomesd.report(unet).rows["UNet2DConditionModel"][0]
    assert (row.work, row.note) == (0.25, "")


@pytest.mark.parametrize("settings", WAYS[:2], ids=str)
def test_keys_of_tokens_that_attention_was_not_given_are_refused(settings):
    class Gathering(_Own):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            return super().__call__(attn, hidden_states, given.flip(0), attention_mask)

    unet = tomesd.apply_patch(sd_unet(), **settings)
    _block(unet.float()).attn1.set_processor(Gathering())
    with pytest.raises(ValueError, match="Gathering must project keys from the tokens that"):
        predict(unet)
    tomesd.apply_patch(unet, prop_attn=False, **settings)
    assert predict(unet).isfinite().all()


def _with_references(block) -> None:
    """As diffusers' community pipeline for reference-only control does it."""
    forward = block.attn1.forward

    def attend(hidden_states, encoder_hidden_states=None, **kwargs):
        return forward(hidden_states, encoder_hidden_states, **kwargs)

    def hacked(hidden_states, encoder_hidden_states=None, cross_attention_kwargs=None, **kwargs):
        x = block.norm1(hidden_states)
        references = torch.cat([x, x.flip(0)], dim=1)
        hidden_states = hidden_states + block.attn1(x, encoder_hidden_states=references)
        x = block.norm2(hidden_states)
        hidden_states = hidden_states + block.attn2(x, encoder_hidden_states=encoder_hidden_states)
        return hidden_states + block.ff(block.norm3(hidden_states))

    block.forward = hacked


def test_references_among_the_keys_stay_as_they_are_where_self_attention_merges():
    _same_as_unmerged(_with_references, {"merge_attn": True})


def test_references_among_the_keys_are_refused_where_whole_blocks_merge():
    unet = tomesd.apply_patch(sd_unet())
    _with_references(unet.get_submodule(WHERE))
    with pytest.raises(ValueError, match="encoder_hidden_states of self-attention must be None"):
        predict(unet)
    assert predict(tomesd.apply_patch(unet, prop_attn=False)).isfinite().all()


class _Maps(_Own):
    """Keeps the maps of cross-attention, as prompt-to-prompt does."""

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.seen.append(hidden_states.shape[1])
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}, {"merge_attn": True}], ids=str)
def test_maps_of_cross_attention_are_of_every_token(settings):
    maps = _Maps()
    unet = tomesd.apply_patch(sd_unet(), **settings | {"max_downsample": 8})
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(maps)
    with attention_lengths(unet) as lengths:
        assert predict(unet).isfinite().all()
    assert set(maps.seen) == {140, 35, 12}
    # And self-attention merges.
    assert lengths[f"{WHERE}.attn1"] == (70, 70)


def test_a_processor_of_cross_attention_changes_a_whole_block_by_rounding_where_tokens_are_equal():
    lengths = _same_as_unmerged(lambda block: block.attn2.set_processor(_Own()), {})
    assert lengths[f"{WHERE}.attn1"] == (32, 32)
    assert lengths[f"{WHERE}.attn2"][0] == 64


def test_maps_that_ledits_keeps_are_of_every_token():
    store = ledits.LeditsAttentionStore(average=False, max_size=140, max_resolution=None)
    unet = tomesd.apply_patch(sd_unet(), ratio=0.75, max_downsample=8)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(
                ledits.LEDITSCrossAttnProcessor(store, "down", pnp=False, editing_prompts=1)
            )
    predict(unet)
    assert {maps.shape[2] for maps in store.step_store["down_cross"]} == {140, 35, 12}


def test_self_attention_guidance_reads_maps_of_every_token():
    parts = sd_components() | {"requires_safety_checker": False}
    pipe = build_pipeline(StableDiffusionSAGPipeline, parts)
    call = {"height": 128, "width": 128, "sag_scale": 1.0}
    before = sample(pipe, **call)
    merged = sample(tomesd.apply_patch(pipe, max_downsample=8), **call)
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert not torch.equal(merged, sample(pipe, **call | {"sag_scale": 0.0}))
    with attention_lengths(pipe.unet) as lengths:
        sample(pipe, **call)
    assert lengths["mid_block.attentions.0.transformer_blocks.0.attn1"] == (16, 16)
    assert lengths[f"{WHERE}.attn1"] == (128, 128)
    assert torch.equal(sample(tomesd.remove_patch(pipe), **call), before)


def _edit(attention) -> None:
    """As editors do that swap queries and keys between samples: another forward in its place."""
    forward = attention.forward

    def edited(hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return forward(hidden_states.flip(0), encoder_hidden_states, attention_mask).flip(0)

    attention.forward = edited


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_a_block_whose_attention_has_another_forward_does_not_merge(settings):
    lengths = _same_as_unmerged(lambda block: _edit(block.attn1), settings)
    assert lengths[f"{WHERE}.attn1"] == (64, 64)


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_learns_that_nothing_merges_since_every_attention_has_another_forward(when):
    unet = sd_unet()
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    if when == "before":
        for attention in attentions:
            _edit(attention)
        with pytest.raises(
            ValueError, match=r"nothing would be merged .* forward of its attention"
        ):
            tomesd.apply_patch(unet)
        return
    tomesd.apply_patch(unet)
    for attention in attentions:
        _edit(attention)
    with pytest.warns(UserWarning, match="nothing merges in UNet2D.*forward of its attention was"):
        predict(unet)


def test_an_error_in_a_processor_that_wants_a_grid_says_that_tokens_merge():
    class Square(_Own):
        def exchange(self, x):
            return x.unflatten(1, (10, 14)).transpose(1, 2).flatten(1, 2)

        def __call__(self, attn, hidden_states, *args, **kwargs):
            hidden_states.unflatten(1, (10, 14))
            return super().__call__(attn, hidden_states, *args, **kwargs)

    unet = tomesd.apply_patch(sd_unet())
    _block(unet.float()).attn1.set_processor(Square())
    with pytest.raises(RuntimeError) as caught:
        predict(unet)
    (note,) = caught.value.__notes__
    assert "ran on 70 of its 140 tokens" in note
    assert "Square computes its attention" in note
    _block(unet.float()).attn1.set_processor(AttnProcessor2_0())
    assert predict(unet).isfinite().all()


def test_a_processor_of_ones_own_gives_the_same_but_for_rounding():
    expected = predict(tomesd.apply_patch(sd_unet()))
    unet = tomesd.apply_patch(sd_unet())
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(RecordingProcessor(module.processor))
    torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-5)
