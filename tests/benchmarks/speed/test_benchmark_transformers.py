"""The benchmark of SD3 and Flux: a few blocks of the published models, and their own ideal."""

import json
from functools import partial

import pytest
import torch

from benchmarks.models import unets
from benchmarks.models.transformers import denoiser
from benchmarks.speed.command import main
from benchmarks.speed.ideal import install_ideal
from benchmarks.speed.variants import Variant, forward, prepare
from tests.benchmarks.support import refused, run_benchmark
from tests.support.slow import slow
from tests.support.tiny_transformers import TINY
from tomesd.diffusion.settings import DiffusionSettings

CPU = torch.device("cpu")
NAMES = ("SD3Transformer2DModel", "FluxTransformer2DModel")
SIDE = 8
BRANCHES = ("attn", "attn2", "ff", "proj_mlp")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """By the name of the class, a folder with nothing but a tiny configuration."""
    found = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "transformer").mkdir()
        config = TINY[name].config | {"_class_name": name}
        (found[name] / "transformer" / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(params=NAMES)
def tiny(request, folders):
    return denoiser(str(folders[request.param]))


@pytest.fixture
def model(tiny):
    return tiny.build(CPU, torch.float32)


@pytest.fixture
def inputs(tiny):
    return tiny.inputs(2, SIDE, CPU, torch.float32)


@pytest.fixture
def benchmark(tmp_path):
    return partial(run_benchmark, tmp_path)


def predict(model, inputs) -> torch.Tensor:
    return forward(model, inputs, compiled=None)()[0]


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "parameters"), [("sd3", 2_028_328_000), ("sd35", 2_243_171_520)])
def test_all_blocks_together_are_the_published_model(name, parameters):
    assert count(denoiser(name, blocks=24).empty()) == parameters


def test_flux_has_blocks_of_the_published_models_size():
    model = denoiser("flux").empty()
    (joint,), (single,) = model.transformer_blocks, model.single_transformer_blocks
    # It has 19 joint blocks and 38 of a single stream.
    assert count(model) + 18 * count(joint) + 37 * count(single) == 11_901_408_320


@pytest.mark.parametrize(("name", "tokens"), [("sd3", 4096 + 333), ("flux", 4096 + 512)])
def test_attention_sees_as_many_tokens_as_in_the_pipeline_at_1024_px(name, tokens):
    found = denoiser(name)
    assert found.size == 1024
    seen = []
    model = found.empty()

    def note(block, args, kwargs):
        seen.append(kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1])

    model.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    args, kwargs = found.inputs(1, found.size // found.pixels, torch.device("meta"), torch.float32)
    model(*args, **kwargs)
    assert seen == [tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_give_finite_predictions_of_a_sensible_size(tiny, dtype):
    model = tiny.build(CPU, dtype)
    sample = predict(model, tiny.inputs(2, SIDE, CPU, dtype))
    assert sample.dtype == dtype
    assert 0.01 < sample.float().std() < 100
    again = tiny.build(CPU, dtype)
    assert torch.equal(predict(again, tiny.inputs(2, SIDE, CPU, dtype)), sample)


def branch_shapes(model, inputs) -> list[tuple]:
    """The shapes with which every branch of every block ran."""
    seen = []

    def note(name, module, args, kwargs, output):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.append((name, tuple(x.shape)))

    handles = [
        module.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name.split(".")[-1] in BRANCHES
    ]
    predict(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0.5}, {"ratio": 0.7}, {"ratio": 0.6, "method": "prune"}, {"prop_attn": False}],
    ids=str,
)
def test_the_ideal_runs_the_same_blocks_on_as_many_tokens_as_the_patch(model, inputs, settings):
    chosen = DiffusionSettings(**settings)
    patched = prepare(unets.share_weights(model), Variant("tome", "patched", chosen))
    ideal = prepare(unets.share_weights(model), Variant("ideal", "ideal", chosen))
    shapes = branch_shapes(ideal, inputs)
    assert shapes == branch_shapes(patched, inputs)
    assert shapes != branch_shapes(model, inputs)


def test_the_ideal_skips_the_blocks_that_the_patch_skips(model, inputs):
    chosen = DiffusionSettings(ratio=0.5, min_tokens=SIDE * SIDE + 1)
    ideal = prepare(unets.share_weights(model), Variant("ideal", "ideal", chosen))
    assert torch.equal(predict(ideal, inputs), predict(model, inputs))


def test_each_block_of_the_ideal_computes_the_first_tokens_at_their_own_positions(model, inputs):
    first, seen = model.transformer_blocks[0], []
    first.register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    handle = install_ideal(model, DiffusionSettings(ratio=0.5))
    first.register_forward_hook(lambda block, args, output: seen.append(output))
    predict(model, inputs)
    handle.remove()
    given, (text, image) = seen[:2]
    x = given["hidden_states"]
    kept = SIDE * SIDE // 2
    by_hand = given | {"hidden_states": x[:, :kept].clone()}
    if "image_rotary_emb" in given:
        ahead = given["encoder_hidden_states"].shape[1]
        by_hand["image_rotary_emb"] = tuple(t[: ahead + kept] for t in given["image_rotary_emb"])
    with torch.no_grad():
        expected_text, expected = first(**by_hand)
    assert torch.equal(image[:, :kept], expected)
    assert torch.equal(image[:, kept:], x[:, kept:])
    assert text is expected_text is None or torch.equal(text, expected_text)


def test_the_ideal_does_not_match_and_is_removed_bit_for_bit(model, inputs, monkeypatch):
    def no_matching(*args):
        raise AssertionError("the ideal must not match")

    monkeypatch.setattr("tomesd.diffusion.matcher.bipartite_soft_matching", no_matching)
    before = predict(model, inputs)
    handle = install_ideal(model, DiffusionSettings(ratio=0.5))
    assert not torch.equal(predict(model, inputs), before)
    handle.remove()
    assert torch.equal(predict(model, inputs), before)


@pytest.mark.parametrize("name", NAMES)
def test_unpatched_patched_and_ideal_are_timed_in_every_round(benchmark, folders, capsys, name):
    record = benchmark("--model", folders[name], "--size", 64, "--rounds", 3, "--no-memory")
    rows = record["forward"]
    assert [row["variant"] for row in rows] == ["unpatched", "tome 0.5", "ideal 0.5"]
    assert all(len(row["seconds"]) == 3 for row in rows)
    base, other = rows[0]["seconds"], rows[1]["seconds"]
    ratios = sorted(a / b for a, b in zip(base, other, strict=True))
    assert rows[1]["speedup"]["median"] == pytest.approx(ratios[1])
    printed = capsys.readouterr().out
    assert "blocks, batch" in printed
    assert "share of ideal" in printed


def test_blocks_is_the_number_of_blocks_that_run(folders):
    folder = str(folders["SD3Transformer2DModel"])
    assert len(denoiser(folder, blocks=1).empty().transformer_blocks) == 1
    assert len(denoiser(folder).empty().transformer_blocks) == 2
    assert denoiser("flux", blocks=3).name == "flux with 3 + 3 blocks"


def test_the_patchs_own_steps_are_timed_on_a_transformers_tokens(benchmark, folders):
    folder = folders["FluxTransformer2DModel"]
    (row,) = benchmark("--model", folder, "--size", 128, "--cost", "--rounds", 1)["cost"]
    assert (row["h"], row["w"], row["channels"], row["blocks"]) == (8, 8, 16, 2)
    assert row["all"]["median"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "1000"], "--size must be a multiple of 16, got 1000"),
        (["--size", "4096"], "--size must be at most 3072 for sd3 with 2 blocks, got 4096"),
        (["--blocks", "0"], "blocks must be from 1 to 24, the model's number, got 0"),
        (["--blocks", "25"], "blocks must be from 1 to 24, the model's number, got 25"),
        (["--bias"], "--bias must not be given for sd3 with 2 blocks: it is for UNets"),
        (["--peer", "tomesd==0.1.3"], "--peer must not be given for sd3 with 2 blocks"),
        (["--no-merge-block"], "merge_block must be True for SD3Transformer2DModel"),
    ],
)
def test_bad_input_is_named_before_any_work(capsys, args, message):
    assert message in refused(main, ["--model", "sd3", *args], capsys)


@slow
def test_the_ideal_compiles_as_one_graph(model, inputs, monkeypatch):
    # The eager backend: what is tested is that there is one graph, not how fast it is.
    compile_ = torch.compile
    monkeypatch.setattr("torch.compile", lambda f, **how: compile_(f, backend="eager", **how))
    torch.compiler.reset()
    ideal = prepare(model, Variant("ideal", "ideal", DiffusionSettings(ratio=0.5)))
    compiled = forward(ideal, inputs, compiled="default")()[0]
    torch.testing.assert_close(compiled, predict(ideal, inputs))
