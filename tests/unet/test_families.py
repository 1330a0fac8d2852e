"""Every UNet that is supported merges at any size and is left as it was; the others say why not.

UNets for video merge within frames: what mixes frames sees every token.
"""

import diffusers
import pytest
import torch

import tomesd
from tests.support.recorders import attention_lengths, count_hooks, is_spatial
from tests.support.slow import slow
from tests.support.tiny_model import WIDTH
from tests.support.tiny_unets import FRAMES, TINY, VIDEOS, sd_unet, unet_inputs

BLOCKS_OR_ATTENTION = pytest.mark.parametrize("settings", [{}, {"merge_attn": True}], ids=str)


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


@torch.no_grad()
def _predict(tiny, model, **size) -> torch.Tensor:
    return tiny.call(model, **size)


@torch.no_grad()
def _lengths(tiny, model, **size) -> dict[str, tuple[int, int]]:
    with attention_lengths(model) as lengths:
        tiny.call(model, **size)
    return lengths


@BLOCKS_OR_ATTENTION
def test_it_merges_at_every_size_and_batch(tiny, settings):
    """Square, oblong and, where the host takes odd sizes, indivisible."""
    model = tiny.build()
    for batch, (h, w) in zip((1, 2, 3), (*tiny.sizes, tiny.sizes[-1])[:3], strict=True):
        at = {"batch": batch, "h": h, "w": w}
        before = _predict(tiny, model, **at)
        with tomesd.patched(model, ratio=0.5, max_downsample=8, **settings):
            merged = _predict(tiny, model, **at)
            assert torch.equal(_predict(tiny, model, **at), merged)
        assert merged.shape == before.shape
        assert merged.isfinite().all()
        assert not torch.equal(merged, before)
        assert torch.equal(_predict(tiny, model, **at), before)


@BLOCKS_OR_ATTENTION
def test_spatial_attention_sees_half_of_the_tokens_and_all_other_attention_what_it_saw(
    tiny, settings
):
    model = tiny.build()
    for h, w in tiny.sizes:
        before = _lengths(tiny, model, h=h, w=w)
        with tomesd.patched(model, ratio=0.5, max_downsample=8, **settings):
            after = _lengths(tiny, model, h=h, w=w)
        assert after.keys() == before.keys()
        assert {before[name][0] for name in before if is_spatial(name)} == {
            h * w,
            -(-h // 2) * -(-w // 2),
        }
        for name, (queries, keys) in before.items():
            if is_spatial(name):
                assert (queries, keys) == (keys, queries)
                assert after[name] == (queries - queries // 2,) * 2
            elif settings or not name.endswith(".attn2"):
                assert after[name] == (queries, keys)


@pytest.mark.parametrize("name", VIDEOS)
def test_temporal_attention_sees_every_frame_at_every_position(name):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build(), max_downsample=8)
    temporal = {
        length for name, length in _lengths(tiny, model).items() if ".attentions." not in name
    } | {
        length
        for name, length in _lengths(tiny, model).items()
        if ".temporal_transformer_blocks." in name and name.endswith(".attn1")
    }
    assert (FRAMES, FRAMES) in temporal


def test_removing_the_patch_leaves_nothing_behind(tiny):
    model = tiny.build()
    before, keys = _predict(tiny, model), list(model.state_dict())
    attributes = [sorted(vars(module)) for module in model.modules()]
    tomesd.apply_patch(model)
    assert not torch.equal(_predict(tiny, model), before)
    assert list(model.state_dict()) == keys
    tomesd.remove_patch(model)
    assert torch.equal(_predict(tiny, model), before)
    assert count_hooks(model) == 0
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def test_a_report_counts_the_tokens_of_one_frame(tiny):
    model = tomesd.apply_patch(tiny.build(), ratio=0.5)
    _predict(tiny, model, h=6, w=10)
    (rows,) = tomesd.report(model).rows.values()
    assert {(row.tokens, row.merged) for row in rows if not row.note} == {(60, 30)}
    assert [row.tokens for row in rows if row.note] == [15]


def test_random_destinations_are_a_function_of_seed_and_timestep(tiny):
    model = tomesd.apply_patch(tiny.build(), use_rand=True)
    early, late = ({"timestep": torch.tensor(step)} for step in (900, 100))
    with torch.no_grad():
        drawn = [tiny.call(model, **step) for step in (early, late, early)]
        tomesd.apply_patch(model, use_rand=True, seed=1)
        other = tiny.call(model, **early)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], other)


def test_gradients_are_the_same_with_checkpointing(tiny):
    model = tomesd.apply_patch(tiny.build().train(), use_rand=True, max_downsample=8)
    if not model._supports_gradient_checkpointing:
        pytest.skip("diffusers' own model knows no gradient checkpointing")

    def gradients() -> list[torch.Tensor | None]:
        model.zero_grad()
        tiny.call(model).square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    model.enable_gradient_checkpointing()
    for got, want in zip(gradients(), expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_checkpointing_two_sizes_of_stable_video_diffusion_before_one_backward_is_an_error():
    # Its blocks get nothing of the host's in which their size could travel.
    tiny = TINY["UNetSpatioTemporalConditionModel"]
    model = tomesd.apply_patch(tiny.build().train())
    model.enable_gradient_checkpointing()
    loss = sum(tiny.call(model, h=h, w=w).square().mean() for h, w in ((8, 8), (6, 10)))
    with pytest.raises(ValueError, match=r"hidden_states .* got 64 tokens: .* call backward"):
        loss.backward()


@slow
@pytest.mark.parametrize("name", ["UNetMotionModel", "UNetSpatioTemporalConditionModel"])
def test_it_compiles_to_one_graph(name):
    tiny, settings = TINY[name], {"use_rand": True}
    expected = _predict(tiny, tomesd.apply_patch(tiny.build(), **settings))
    torch.compiler.reset()
    model = torch.compile(tiny.build(), backend="eager", fullgraph=True)
    got = _predict(tiny, tomesd.apply_patch(model, **settings))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_kandinsky_2_unet_is_refused_with_the_reason():
    unet = sd_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
    )
    with torch.no_grad():
        assert unet(**unet_inputs(unet, h=8, w=12)).sample.isfinite().all()
    with pytest.raises(ValueError, match="UNet2DConditionModel: its attention has no transformer"):
        tomesd.apply_patch(unet)
    assert count_hooks(unet) == 0


@pytest.mark.parametrize("name", ["Kandinsky3UNet", "StableCascadeUNet", "UNet2DModel"])
def test_a_unet_without_spatial_transformers_is_refused_by_its_name(name):
    with torch.device("meta"):
        unet = getattr(diffusers, name)()
    with pytest.raises(TypeError, match=f"model must not be a {name}: it has no spatial"):
        tomesd.apply_patch(unet)
    assert count_hooks(unet) == 0
