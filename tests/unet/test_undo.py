"""Removing a patch from a UNet leaves no trace; while it is there, outputs repeat bit for bit."""

import copy
import pickle

import pytest
import torch

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_pipelines import sd_pipeline
from tests.support.tiny_unets import controlnet, predict, sd_unet, sdxl_unet

EVERYTHING = {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8}
SETTINGS = [
    {},
    {"use_rand": True},
    {"method": "prune"},
    {"merge_queries": False},
    {"preset": "paper"},
    EVERYTHING,
]


def _outside(model: torch.nn.Module) -> dict:
    """All that others can see of a model, but for its weights and hooks."""
    return {
        "classes": [type(module) for module in model.modules()],
        "names": [name for name, _ in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [vars(module).get("forward") for module in model.modules()],
        "state_dict": list(model.state_dict()),
        "config": dict(model.config),
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("build", [sd_unet, sdxl_unet])
def test_removing_the_patch_restores_the_output_bit_for_bit(build, settings):
    unet = build()
    before = predict(unet)
    tomesd.apply_patch(unet, ratio=0.5, **settings)
    assert not torch.equal(predict(unet), before)
    tomesd.remove_patch(unet)
    assert torch.equal(predict(unet), before)


def test_removing_the_patch_leaves_no_hook_and_no_attribute():
    unet = sd_unet()
    before, processors = _outside(unet), unet.attn_processors
    tomesd.apply_patch(unet, **EVERYTHING)
    predict(unet)
    assert count_hooks(unet) > 0
    tomesd.remove_patch(unet)
    assert count_hooks(unet) == 0
    assert _outside(unet) == before
    assert unet.attn_processors == processors


def test_a_patched_model_keeps_its_classes_state_dict_and_processors():
    unet = sd_unet()
    before, processors = _outside(unet), unet.attn_processors
    tomesd.apply_patch(unet, **EVERYTHING)
    predict(unet)
    patched = _outside(unet)
    for what in ("classes", "names", "forwards", "state_dict", "config"):
        assert patched[what] == before[what]
    assert unet.attn_processors == processors


def test_hooks_of_others_survive_applying_and_removing():
    unet, calls = sd_unet(), []
    unet.mid_block.register_forward_hook(lambda *_: calls.append("theirs"))
    tomesd.apply_patch(unet)
    predict(unet)
    tomesd.remove_patch(unet)
    predict(unet)
    assert calls == ["theirs", "theirs"]
    assert count_hooks(unet) == 1


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_two_patched_runs_with_one_seed_are_equal_bit_for_bit(settings):
    unet = tomesd.apply_patch(sd_unet(), seed=7, **settings)
    assert torch.equal(predict(unet), predict(unet))


@pytest.mark.parametrize("settings", [{"use_rand": True}, {"method": "prune"}], ids=str)
def test_the_global_random_state_is_neither_read_nor_changed(settings):
    unet = tomesd.apply_patch(sd_unet(), **settings)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = predict(unet)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(predict(unet), first)


def test_a_patched_pipeline_repeats_its_picture_and_gets_back_the_unpatched_one():
    pipe = sd_pipeline()

    def picture():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt").images

    unpatched = picture()
    tomesd.apply_patch(pipe, ratio=0.5)
    patched = picture()
    assert torch.equal(picture(), patched)
    assert not torch.equal(patched, unpatched)
    tomesd.remove_patch(pipe)
    assert torch.equal(picture(), unpatched)


def test_applying_again_replaces_the_settings():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.25, max_downsample=8, merge_mlp=True)
    tomesd.apply_patch(unet, ratio=0.5)
    fresh = tomesd.apply_patch(sd_unet(), ratio=0.5)
    assert torch.equal(predict(unet), predict(fresh))
    assert count_hooks(unet) == count_hooks(fresh)
    tomesd.remove_patch(unet)
    assert count_hooks(unet) == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_ratio_of_zero_changes_no_bit(settings):
    unet = sd_unet()
    before = predict(unet)
    tomesd.apply_patch(unet, ratio=0, **settings)
    assert torch.equal(predict(unet), before)


def test_apply_and_remove_return_what_they_were_given():
    unet, pipe = sd_unet(), sd_pipeline()
    wrapped = torch.nn.DataParallel(unet)
    for model in (unet, pipe, wrapped, controlnet(unet)):
        assert tomesd.apply_patch(model) is model
        assert tomesd.remove_patch(model) is model
    with tomesd.patched(unet) as given:
        assert given is unet


def test_removing_from_a_model_without_a_patch_does_nothing():
    unet = sd_unet()
    before = predict(unet)
    assert tomesd.remove_patch(tomesd.remove_patch(unet)) is unet
    assert torch.equal(predict(unet), before)


def test_patched_merges_inside_the_block_and_undoes_on_leaving():
    unet = sd_unet()
    before = predict(unet)
    with tomesd.patched(unet, ratio=0.5, merge_mlp=True):
        inside = predict(unet)
    expected = predict(tomesd.apply_patch(sd_unet(), ratio=0.5, merge_mlp=True))
    assert torch.equal(inside, expected)
    assert torch.equal(predict(unet), before)
    assert count_hooks(unet) == 0


def test_patched_undoes_after_an_exception_from_inside_the_model():
    unet = sd_unet()
    before, outside = predict(unet), _outside(unet)
    failing = unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tomesd.patched(unet, ratio=0.5):
        predict(unet)
    failing.remove()
    assert count_hooks(unet) == 0
    assert _outside(unet) == outside
    assert torch.equal(predict(unet), before)


def test_a_model_still_works_after_a_forward_pass_that_failed_inside_a_block():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.5)
    before = predict(unet)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    failing = block.ff.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(unet)
    failing.remove()
    assert torch.equal(predict(unet), before)


def test_patched_restores_an_earlier_patch_also_after_an_exception():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.25)
    before, count = predict(unet), count_hooks(unet)
    with tomesd.patched(unet, ratio=0.5, merge_mlp=True):
        assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(unet), before)
    failing = unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tomesd.patched(unet, ratio=0.5, merge_mlp=True):
        predict(unet)
    failing.remove()
    assert torch.equal(predict(unet), before)
    assert count_hooks(unet) == count
    tomesd.remove_patch(unet)
    assert count_hooks(unet) == 0


def test_patched_with_bad_settings_keeps_an_earlier_patch():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.25)
    before = predict(unet)
    with pytest.raises(ValueError, match="ratio"), tomesd.patched(unet, ratio=2.0):
        pass
    assert torch.equal(predict(unet), before)


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("settings", [{}, {"use_rand": True}], ids=str)
def test_a_copy_of_a_patched_model_has_a_patch_of_its_own(copied, settings):
    unet = sd_unet()
    unpatched = predict(unet)
    tomesd.apply_patch(unet, ratio=0.5, **settings)
    patched, count = predict(unet), count_hooks(unet)

    other = copied(unet)
    assert torch.equal(predict(other), patched)
    tomesd.remove_patch(other)
    assert torch.equal(predict(other), unpatched)
    assert (count_hooks(other), count_hooks(unet)) == (0, count)
    assert torch.equal(predict(unet), patched)

    other = copied(unet)
    tomesd.remove_patch(unet)
    assert (count_hooks(other), count_hooks(unet)) == (count, 0)
    assert torch.equal(predict(other), patched)
    # The copy reports its own pictures, not those of the original.
    predict(unet, h=6, w=6)
    assert tomesd.report(other).rows["UNet2DConditionModel"][0].tokens == 140


def test_saving_a_patched_model_saves_a_clean_one(tmp_path):
    unet = sd_unet()
    before = predict(unet)
    unet.save_pretrained(tmp_path / "clean")
    tomesd.apply_patch(unet, ratio=0.5).save_pretrained(tmp_path / "patched")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        clean, patched = (tmp_path / folder / name for folder in ("clean", "patched"))
        assert patched.read_bytes() == clean.read_bytes()
    loaded = type(unet).from_pretrained(tmp_path / "patched")
    assert torch.equal(predict(loaded), before)
    assert count_hooks(loaded) == 0
