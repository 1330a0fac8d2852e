"""A wrong setting of a Vision Transformer is refused with what is allowed; the report."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tomesd
from tests.support import tiny_unets
from tests.support.tiny_vits import build


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": -1}, ValueError, "r must be 0 or more, got -1"),
        ({"r": np.float64(3)}, TypeError, "r must be an int .* got np.float64"),
        ({"r": np.True_}, TypeError, "r must be an int .* got np.True_"),
        ({"speedup": True}, TypeError, "speedup must be float, got True"),
        ({"r": 2.5}, TypeError, "r must be an int .* got 2.5"),
        ({"r": [1, 2]}, ValueError, "r must have one number for each of 3 layers"),
        ({}, TypeError, "r .*or speedup must be given"),
        ({"r": 3, "speedup": 2.0}, ValueError, "r must not be given with speedup"),
        ({"speedup": 50}, ValueError, "speedup must be at most"),
        ({"speedup": "2x"}, TypeError, "speedup must be float, got '2x'"),
        ({"ratio": 0.5}, TypeError, "ViTModel must be given r.*ratio and preset are for diffusion"),
        ({"r": 3, "ratio": 0.5}, TypeError, "ratio and preset are for diffusion"),
        ({"r": 3, "preset": "paper"}, TypeError, "ratio and preset are for diffusion"),
        ({"r": 3, "sx": 2}, TypeError, "setting must be one of r, speedup, .* got 'sx'"),
        ({"r": 3, "prop_attn": 1}, TypeError, "prop_attn must be bool, got 1"),
        ({"r": 3, "unmerge": None}, TypeError, "unmerge must be bool, got None"),
        ({"r": 3, "method": "kmeans"}, TypeError, "got 'method': .* benchmarks/classifier"),
    ],
)
@torch.no_grad()
def test_a_wrong_setting_is_refused_with_what_is_allowed_and_changes_nothing(
    settings, error, message
):
    vit = build("ViT")
    expected = vit.output()
    with pytest.raises(error, match=message):
        tomesd.apply_patch(vit.model, **settings)
    assert torch.equal(vit.output(), expected)
    with pytest.raises(ValueError, match="model must be patched"):
        tomesd.report(vit.model)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"r": np.int64(8)}, {"r": 8}),
        ({"r": [np.int32(8), np.int64(0), 3]}, {"r": [8, 0, 3]}),
        ({"r": (np.int64(8), np.float32(-1))}, {"r": (8, -1)}),
        ({"speedup": np.float64(1.3)}, {"speedup": 1.3}),
        ({"speedup": np.float32(1.25)}, {"speedup": 1.25}),
    ],
    ids=str,
)
def test_numpy_s_numbers_count_as_python_s(settings, same):
    models = [tomesd.apply_patch(build("ViT").model, **given) for given in (settings, same)]
    ours, plain = (model.vit._tomesd_patch for model in models)
    assert ours.settings == plain.settings
    assert ours.forward.schedule == plain.forward.schedule
    numbers = [*ours.forward.schedule, *vars(ours.settings).values()]
    assert not any(isinstance(value, np.generic) for value in numbers)


def test_denoisers_refuse_r_and_name_ratio():
    with pytest.raises(TypeError, match="UNet2DConditionModel must be given ratio"):
        tomesd.apply_patch(tiny_unets.sd_unet(), r=8)


def test_an_unknown_model_is_refused_in_few_words_with_the_closest_supported_ones():
    class ViTModell(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"got ViTModell\. The closest .* ViTModel,.*") as refused:
        tomesd.apply_patch(ViTModell(2, 2), r=8)
    assert len(str(refused.value)) <= 300
    with pytest.raises(TypeError, match=r"supported\(\), got Linear\. docs/adding-a-model"):
        tomesd.apply_patch(nn.Linear(2, 2), r=8)


def test_the_settings_choose_which_kind_of_model_is_patched():
    both = nn.ModuleDict({"unet": tiny_unets.sd_unet(), "vit": build("ViT").model})
    tomesd.apply_patch(both, ratio=0.5)
    assert list(tomesd.report(both).rows) == ["unet"]
    tomesd.apply_patch(both, r=3)
    assert list(tomesd.report(both).rows) == ["unet", "vit.vit"]
    tomesd.remove_patch(both)
    tomesd.apply_patch(both)
    assert list(tomesd.report(both).rows) == ["unet"]


def test_the_report_shows_what_is_left_after_each_layer_and_what_was_clipped():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=[3, 0, 40])
    rows = tomesd.report(vit.model).rows["vit"]
    assert [(row.tokens, row.merged) for row in rows] == [(37, 34), (37, 34), (37, 18)]
    assert [row.note for row in rows] == ["", "", "r clipped from 40 to 16"]
    assert rows[2].work == pytest.approx((34 / 37) ** 2)
    assert "r clipped from 40 to 16" in str(tomesd.report(vit.model))


@torch.no_grad()
def test_the_report_counts_the_tokens_that_a_run_had():
    vit = build("ViTMAE", mask_ratio=0.75)
    tomesd.apply_patch(vit.model, r=1)
    before = tomesd.report(vit.model)
    vit.output()
    assert before.rows == tomesd.report(vit.model).rows
    assert before.rows["vit"][0].tokens == 10


@pytest.mark.parametrize("name", ["ViT", "timm", "torchvision", "VideoMAE", "AST", "SigLIP"])
@torch.no_grad()
def test_every_family_knows_its_own_number_of_tokens(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=1)
    before = tomesd.report(vit.model)
    vit.output()
    assert before.rows == tomesd.report(vit.model).rows


@pytest.mark.parametrize("name", ["ViT", "timm", "torchvision", "VideoMAE"])
def test_a_speedup_counts_the_multiplications_of_the_layers(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, speedup=1.3)
    (patch,) = [m._tomesd_patch for m in vit.model.modules() if "_tomesd_patch" in m.__dict__]
    schedule, tokens, width = patch.forward.schedule, patch.own_tokens, 24
    (hidden,) = {
        p.shape[0]
        for p in vit.blocks[0].parameters()
        if p.dim() == 2 and p.shape[1] == width and p.shape[0] not in (width, 3 * width)
    }

    def multiplied(schedule: list[int]) -> int:
        total, n = 0, tokens
        for r in schedule:
            merged = n - min(r, (n - vit.prefix) // 2)
            total += 4 * n * width**2 + 2 * n**2 * width + 2 * merged * width * hidden
            n = merged
        return total

    full = multiplied([0] * 3)
    assert full / multiplied(schedule) >= 1.3
    assert full / multiplied([r - 1 for r in schedule]) < 1.3


@torch.no_grad()
def test_a_speedup_saves_that_share_of_the_multiply_adds():
    def flops(vit) -> int:
        with FlopCounterMode(display=False) as counter:
            vit.output()
        return counter.get_total_flops()

    vit = build("ViT", image_size=48, attn_implementation="eager")
    vit.inputs = {"pixel_values": torch.randn(1, 3, 48, 48)}
    full = flops(vit)
    tomesd.apply_patch(vit.model, speedup=2.0)
    # What is counted but not saved: patches, the head, and the matching itself.
    assert 1.8 < full / flops(vit) < 2.0


@torch.no_grad()
def test_leaving_a_with_block_restores_the_patch_before_it():
    vit = build("ViT")
    plain = vit.output()
    with tomesd.patched(vit.model, r=3):
        merged = vit.output()
        with tomesd.patched(vit.model, r=9):
            assert not torch.equal(vit.output(), merged)
        assert torch.equal(vit.output(), merged)
    assert torch.equal(vit.output(), plain)
