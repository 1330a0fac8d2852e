"""Full-size UNets have the published shapes, and the ideal runs on as few tokens as the patch."""

import pytest
import torch

import tomesd
from benchmarks.models import unets
from benchmarks.speed.ideal import install_ideal
from benchmarks.speed.variants import Variant, forward, prepare
from tests.benchmarks.support import UNET
from tests.support.slow import slow
from tomesd.diffusion.settings import DiffusionSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet():
    return unets.build_unet(UNET, CPU, torch.float32)


@pytest.fixture(scope="module")
def inputs():
    return unets.unet_inputs(UNET, 2, 8, CPU, torch.float32)


@slow
@pytest.mark.parametrize(
    ("name", "parameters", "levels"),
    [
        ("sd15", 859_520_964, [(4096, 320, 5), (1024, 640, 5), (256, 1280, 5), (64, 1280, 1)]),
        ("sdxl", 2_567_463_684, [(1024, 640, 10), (256, 1280, 60)]),
    ],
)
def test_full_size_models_have_the_published_parameters_and_levels(name, parameters, levels):
    config = unets.denoiser(name).config
    assert sum(p.numel() for p in unets.empty_unet(config).parameters()) == parameters
    found = unets.levels(config, 64)
    assert [(level.h * level.w, level.channels, level.blocks) for level in found] == levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_give_finite_predictions_of_a_sensible_size(dtype):
    unet = unets.build_unet(UNET, CPU, dtype)
    inputs = unets.unet_inputs(UNET, 2, 8, CPU, dtype)
    (sample,) = forward(unet, inputs, compiled=None)()
    assert sample.dtype == dtype
    assert sample.shape == (2, 4, 8, 8)
    assert 0.1 < sample.float().std() < 10


def test_models_that_share_weights_are_patched_independently(unet, inputs):
    before = forward(unet, inputs, compiled=None)()[0]
    twin = unets.share_weights(unet)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in unet.parameters()}
    assert torch.equal(forward(twin, inputs, compiled=None)()[0], before)
    tomesd.apply_patch(twin, ratio=0.5)
    assert not torch.equal(forward(twin, inputs, compiled=None)()[0], before)
    assert torch.equal(forward(unet, inputs, compiled=None)()[0], before)


def branch_shapes(unet, inputs) -> list[tuple]:
    """The shapes with which every branch of every block ran: tokens in, keys, tokens out."""
    seen = []

    def note(name):
        def hook(module, args, kwargs, output):
            keys = kwargs.get("encoder_hidden_states")
            shape = None if keys is None else tuple(keys.shape)
            seen.append((name, tuple(args[0].shape), shape))

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in unet.named_modules()
        if name.split(".")[-1] in ("attn1", "attn2", "ff")
    ]
    forward(unet, inputs, compiled=None)()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.5},
        {"ratio": 0.3, "max_downsample": 2},
        {"ratio": 0.5, "merge_block": False},
        {"ratio": 0.75, "merge_block": False, "merge_queries": False},
        {
            "ratio": 0.5,
            "merge_block": False,
            "merge_attn": False,
            "merge_mlp": True,
            "merge_crossattn": True,
        },
        {"ratio": 0.6, "method": "prune"},
    ],
)
def test_the_ideal_runs_the_same_blocks_on_as_many_tokens_as_the_patch(unet, inputs, settings):
    chosen = DiffusionSettings(**settings)
    patched = prepare(unets.share_weights(unet), Variant("tome", "patched", chosen))
    ideal = prepare(unets.share_weights(unet), Variant("ideal", "ideal", chosen))
    shapes = branch_shapes(ideal, inputs)
    assert shapes == branch_shapes(patched, inputs)
    assert shapes != branch_shapes(unet, inputs)


def test_the_ideal_does_not_match_and_does_not_touch_other_tokens(inputs, monkeypatch):
    def no_matching(*args):
        raise AssertionError("the ideal must not match")

    monkeypatch.setattr("tomesd.diffusion.matcher.bipartite_soft_matching", no_matching)
    unet = unets.build_unet(UNET, CPU, torch.float32)
    seen = []
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    install_ideal(unet, DiffusionSettings(ratio=0.5))
    block.attn1.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    block.norm1.register_forward_hook(lambda module, args, output: seen.append(output))
    forward(unet, inputs, compiled=None)()
    normed, (merged, output) = seen
    assert torch.equal(merged, normed[:, :32])
    assert merged.data_ptr() == normed.data_ptr()
    assert output.shape == normed.shape
    assert not output[:, 32:].any()


def test_removing_the_ideal_restores_the_output_bit_for_bit(unet, inputs):
    twin = unets.share_weights(unet)
    before = forward(twin, inputs, compiled=None)()[0]
    handle = install_ideal(twin, DiffusionSettings(ratio=0.5))
    assert not torch.equal(forward(twin, inputs, compiled=None)()[0], before)
    handle.remove()
    assert torch.equal(forward(twin, inputs, compiled=None)()[0], before)


def test_the_compile_mode_is_passed_to_torch_compile(unet, inputs, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.compile", lambda f, mode, **how: asked.append(mode) or f)
    forward(unet, inputs, compiled="reduce-overhead")()
    assert asked == ["reduce-overhead"]


@slow
def test_each_compiled_variant_runs_its_own_graph(unet, inputs, monkeypatch):
    # The eager backend: what is tested is which graph runs, not how fast.
    compile_ = torch.compile
    monkeypatch.setattr("torch.compile", lambda f, **how: compile_(f, backend="eager", **how))
    torch.compiler.reset()
    settings = DiffusionSettings(ratio=0.5)
    variants = [Variant("unpatched", "unpatched"), Variant("tome", "patched", settings)]
    models = [prepare(unets.share_weights(unet), variant) for variant in variants]
    eager = [forward(model, inputs, compiled=None)()[0] for model in models]
    compiled = [forward(model, inputs, compiled="default")()[0] for model in models]
    for expected, got in zip(eager, compiled, strict=True):
        torch.testing.assert_close(got, expected)
    assert not torch.allclose(eager[0], eager[1], atol=1e-4)


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="must hold a UNet2DConditionModel, got 'AutoencoderKL'"):
        unets.denoiser(str(tmp_path))
