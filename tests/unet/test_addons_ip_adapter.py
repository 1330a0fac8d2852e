"""IP-Adapters let a UNet attend to pictures beside the text, also while tokens merge.

"before": the adapter was loaded before patching.
"""

import pytest
import torch

import tomesd
from tests.support.recorders import inputs_of
from tests.support.tiny_model import WIDTH
from tests.support.tiny_pipelines import sample, sd_pipeline

SIZE = {"height": 80, "width": 112}
# Of the image encoder's output, which becomes 4 tokens.
CLIP_WIDTH = 8


def _weights(unet, seed: int) -> dict:
    """A random IP-Adapter, as its authors' files have it."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    projection = {
        "proj.weight": normal(4 * WIDTH, CLIP_WIDTH),
        "proj.bias": normal(4 * WIDTH),
        "norm.weight": normal(WIDTH),
        "norm.bias": normal(WIDTH),
    }
    layers = {}
    names = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(names):
        width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{part}.weight"] = normal(width, WIDTH)
    return {"image_proj": projection, "ip_adapter": layers}


def _load(pipe, adapters: int = 1):
    weights = [_weights(pipe.unet, seed) for seed in range(adapters)]
    empty = [""] * adapters
    pipe.load_ip_adapter(weights, subfolder=empty, weight_name=empty, image_encoder_folder=None)
    return pipe


def _embeds(seed: int = 0, pictures: int = 1) -> torch.Tensor:
    """Of one prompt's pictures, those of guidance first."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, pictures, CLIP_WIDTH, generator=draw)


def _sample(pipe, *embeds: torch.Tensor, **call) -> torch.Tensor:
    given = {"ip_adapter_image_embeds": list(embeds)} if embeds else {}
    return sample(pipe, **SIZE | given | call)


def _queries(pipe, *embeds: torch.Tensor, **call) -> dict[str, set[int]]:
    """How many tokens look at each other, and at text and pictures."""
    with inputs_of(pipe.unet, "attn1") as own, inputs_of(pipe.unet, "attn2") as cross:
        _sample(pipe, *embeds, **call)
    return {"attn1": {n for _, n in own}, "attn2": {n for _, n in cross}}


def _masks() -> dict:
    """The left half of the picture looks at it."""
    mask = torch.zeros(1, 1, 80, 112)
    mask[..., :56] = 1
    return {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}], ids=str)
def test_merged_tokens_attend_to_pictures(settings, adapters, when):
    embeds = [_embeds(seed) for seed in range(adapters)]
    unpatched = _sample(_load(sd_pipeline(), adapters), *embeds)
    pipe = sd_pipeline()
    if when == "before":
        tomesd.apply_patch(_load(pipe, adapters), **settings)
    else:
        _load(tomesd.apply_patch(pipe, **settings), adapters)
    merged = _sample(pipe, *embeds)
    assert merged.isfinite().all()
    assert not torch.equal(merged, unpatched)
    others = [_embeds(seed + 9) for seed in range(adapters)]
    for index in range(adapters):
        changed = [*embeds[:index], others[index], *embeds[index + 1 :]]
        assert not torch.equal(_sample(pipe, *changed), merged)
    pipe.set_ip_adapter_scale([0.0] * adapters)
    bare = _sample(pipe, *embeds)
    assert torch.equal(_sample(pipe, *others), bare)
    pipe.set_ip_adapter_scale([1.0] * adapters)
    assert torch.equal(_sample(pipe, *embeds), merged)
    assert torch.equal(_sample(tomesd.remove_patch(pipe), *embeds), unpatched)


def test_in_merged_blocks_merged_tokens_attend_to_pictures():
    pipe = tomesd.apply_patch(_load(sd_pipeline()), preset="steady")
    seen = _queries(pipe, _embeds())
    assert seen["attn1"] == seen["attn2"] == {70, 35, 12}


def test_taking_the_adapter_off_leaves_merging_on():
    pipe = tomesd.apply_patch(sd_pipeline())
    expected = _sample(pipe)
    _load(pipe)
    assert not torch.equal(_sample(pipe, _embeds()), expected)
    pipe.unload_ip_adapter()
    assert torch.equal(_sample(pipe), expected)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "merge_block"), ({"merge_crossattn": True}, "merge_crossattn")],
)
def test_masks_are_refused_where_tokens_would_merge_in_cross_attention(settings, name):
    pipe = tomesd.apply_patch(_load(sd_pipeline()), **settings)
    with pytest.raises(ValueError, match=f"{name} must be False with ip_adapter_masks, got True"):
        _sample(pipe, _embeds(), **_masks())


@pytest.mark.parametrize(
    "settings", [{"merge_attn": True}, {"merge_mlp": True}, {"preset": "quality"}], ids=str
)
def test_masks_of_pictures_still_apply_where_self_attention_merges(settings):
    pipe = _load(sd_pipeline())
    unpatched = _sample(pipe, _embeds(), **_masks())
    tomesd.apply_patch(pipe, **settings)
    merged = _sample(pipe, _embeds(), **_masks())
    assert merged.isfinite().all()
    assert not torch.equal(merged, unpatched)
    assert not torch.equal(_sample(pipe, _embeds()), merged)
    assert _queries(pipe, _embeds(), **_masks())["attn2"] == {140, 35, 12}
    assert torch.equal(_sample(tomesd.remove_patch(pipe), _embeds(), **_masks()), unpatched)


def test_a_mask_of_nothing_hides_the_picture_while_self_attention_merges():
    pipe = tomesd.apply_patch(_load(sd_pipeline()), merge_attn=True)
    nothing = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.zeros(1, 1, 80, 112)]}}
    hidden = _sample(pipe, _embeds(), **nothing)
    torch.testing.assert_close(_sample(pipe, _embeds(9), **nothing), hidden, rtol=0, atol=0)
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(_sample(pipe, _embeds()), hidden, rtol=0, atol=1e-4)
