"""What some families are given besides the usual: references, sounds, hints, coordinates."""

import pytest
import torch
from torch import Tensor

import tomesd
from tests.support.recorders import AttentionRecorder
from tests.support.tiny_transformers import TEXT_TOKENS, TINY, TinyTransformer, ids

COSMOS, LTX = TINY["CosmosTransformer3DModel"], TINY["LTXVideoTransformer3DModel"]
NOISE = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _attention(tiny: TinyTransformer, model, **given) -> list[tuple[int, int]]:
    with AttentionRecorder() as attention:
        assert tiny.call(model, **given).isfinite().all()
    return attention.seen


def _coordinates(frames: int, h: int, w: int) -> Tensor:
    """As LTX's pipelines make them: pixels, and the first frame is a single one."""
    axes = torch.meshgrid(*map(torch.arange, (frames, h, w)), indexing="ij")
    places = torch.stack(axes).flatten(1) * torch.tensor([[8.0], [32.0], [32.0]])
    places[0] = (places[0] - 7).clamp(min=0) / 25
    return places.expand(2, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "h", "w"), [(2, 5, 7), (3, 4, 4), (2, 1, 6), (2, 6, 1)])
@pytest.mark.parametrize("told", [{}, {"num_frames": 1, "height": 1, "width": 1}], ids=str)
def test_ltx_video_reads_its_grid_from_coordinates(frames, h, w, told):
    """Its pipelines with conditions pass nothing else, or ones."""
    model = tomesd.apply_patch(LTX.build(), ratio=0.5, min_tokens=0)
    given = LTX.inputs(h=h, w=w) | {"video_coords": _coordinates(frames, h, w)}
    for name in ("num_frames", "height", "width"):
        del given[name]
    given["hidden_states"] = torch.randn(2, frames * h * w, 4)
    assert model(**given | told).sample.isfinite().all()
    assert model._tomesd_patch.hooks.last.grids == ((frames, h, w),)


def test_coordinates_that_are_no_grid_are_refused():
    model = tomesd.apply_patch(LTX.build())
    coordinates = _coordinates(2, 5, 7)[:, :, torch.randperm(70)]
    with pytest.raises(ValueError, match="video_coords must list the tokens of frames of one size"):
        LTX.call(model, video_coords=coordinates)


@torch.no_grad()
def test_what_a_controlnet_made_for_cosmos_is_added_to_every_token():
    model = tomesd.apply_patch(COSMOS.build(num_layers=1, controlnet_block_every_n=1))
    blocks = []
    model.norm_out.register_forward_pre_hook(lambda _, args: blocks.append(args[0]))
    COSMOS.call(model)
    COSMOS.call(model, block_controlnet_hidden_states=[NOISE])
    plain, controlled = blocks
    torch.testing.assert_close(controlled, plain + NOISE, rtol=0, atol=1e-5)


@torch.no_grad()
def test_learned_positions_of_cosmos_are_added_to_every_token():
    """Without anything else in a block, it adds them alone."""
    model = COSMOS.build(num_layers=1, extra_pos_embed_type="learnable")
    for name in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"):
        torch.nn.init.zeros_(model.transformer_blocks[0].get_submodule(name).weight)
    expected = COSMOS.call(model)
    tomesd.apply_patch(model, ratio=0.5)
    torch.testing.assert_close(COSMOS.call(model), expected, rtol=0, atol=1e-5)
    assert (36, 36) in _attention(COSMOS, model)


def test_the_sound_of_kandinsky_weighs_the_tokens_of_the_video():
    tiny = TINY["Kandinsky6Transformer3DModel"]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    with AttentionRecorder() as attention:
        tiny.predict(model, audio_hidden_states=torch.randn(2, 9, 4))
    masked = [
        pair
        for pair, mask in zip(attention.seen, attention.masks, strict=True)
        if mask is not None and mask.abs().sum() > 0
    ]
    # In each of two blocks: of the video to itself, and of the sound to the video.
    assert masked == [(36, 36), (9, 36)] * 2
    assert attention.seen.count((36, 9)) == 2


@torch.no_grad()
def test_sparse_attention_of_kandinsky_is_refused():
    tiny = TINY["Kandinsky5Transformer3DModel"]
    model = tomesd.apply_patch(tiny.build())
    with pytest.raises(ValueError, match="sparse_params must be None while tokens merge"):
        tiny.call(model, sparse_params={"to_fractal": True})


def test_reference_images_of_flux3_merge_within_themselves():
    tiny = TINY["Flux3Transformer2DModel"]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    references = torch.cat([ids(4, 6, picture=1), ids(3, 5, picture=2)])
    given = {
        "image_cond_hidden_states": torch.randn(2, 24 + 15, 4),
        "image_cond_ids": torch.cat([references, torch.zeros(39, 1)], dim=1),
    }
    # Text, image, references, and all together.
    joint = TEXT_TOKENS + 18 + 12 + 8
    assert _attention(tiny, model, **given) == [(5, 5), (18, 18), (39, 39), (joint, joint)]


@torch.no_grad()
def test_items_of_joy_image_merge_within_themselves():
    tiny = TINY["JoyImageEditTransformer3DModel"]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    items = torch.randn(2, 2, 4, 1, 10, 14)
    assert _attention(tiny, model, hidden_states=items)[0] == (36 + TEXT_TOKENS,) * 2
    plus = TINY["JoyImageEditPlusTransformer3DModel"]
    model = tomesd.apply_patch(plus.build(), ratio=0.5)
    given = {
        "hidden_states": torch.randn(2, 35 + 24, 4, 1, 2, 2),
        "shape_list": [[(1, 5, 7), (1, 4, 6)]] * 2,
    }
    assert _attention(plus, model, **given)[0] == (18 + 12 + TEXT_TOKENS,) * 2
    shapes = [[(1, 5, 7), (1, 4, 6)], [(1, 5, 7)]]
    with pytest.raises(ValueError, match="shape_list must have the same images for every sample"):
        plus.call(model, **given | {"shape_list": shapes})


def test_the_last_blocks_of_motif_read_the_whole_video():
    tiny = TINY["MotifVideoTransformer3DModel"]
    model = tiny.build(num_single_layers=2, num_decoder_layers=1)
    tomesd.apply_patch(model, ratio=0.5)
    # In place of the text.
    assert _attention(tiny, model)[-1] == (36 + 70, 36 + 70)


def test_experts_of_hidream_are_chosen_by_merged_tokens():
    tiny = TINY["HiDreamImageTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build(num_routed_experts=4), ratio=0.5)
    # Padding to 44 tokens and three texts stay.
    left = 44 - 17 + 3 * TEXT_TOKENS
    assert _attention(tiny, model) == [(left, left)] * 2
    with pytest.raises(ValueError, match="hidden_states must be latents"):
        tiny.call(
            model,
            hidden_states=torch.randn(2, 44, 16),
            hidden_states_masks=torch.ones(2, 44),
            img_ids=torch.zeros(2, 44, 3),
            img_sizes=[(5, 7)] * 2,
        )


def test_the_image_of_ideogram_must_be_at_the_end():
    tiny = TINY["Ideogram4Transformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    with pytest.raises(ValueError, match="indicator must have the image at the end"):
        tiny.call(model, indicator=tiny.inputs()["indicator"].flip(1))


@pytest.mark.parametrize("batch", [1, 2])
def test_reference_images_of_fibo_merge_within_themselves(batch):
    """With texts of one length its gist comes before the images, and else after them."""
    tiny = TINY["BriaFibo2Transformer2DModel"]
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    images = 18 + 12
    references = [torch.randn(batch, 4, 8, 12)]
    seen = _attention(tiny, model, batch=batch, context_latents=references)
    gist = 7 if batch == 2 else 6
    assert [pair for pair in seen if pair[0] >= images] == [
        (images, images),
        (images + gist, images + gist),
        (images + gist, images + gist),
        (images + gist, TEXT_TOKENS),
    ]
