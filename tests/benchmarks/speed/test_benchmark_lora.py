"""The benchmark's LoRA training step trains the adapter, with and without merging."""

import json
from functools import partial

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.common.memory import Peak
from benchmarks.speed.command import main
from benchmarks.speed.lora_training import training_step
from benchmarks.speed.variants import Variant
from tests.benchmarks.support import UNET, refused, run_benchmark
from tests.support.recorders import AttentionRecorder
from tests.support.tiny_transformers import TINY
from tomesd.diffusion.settings import DiffusionSettings

UNPATCHED = Variant("unpatched", "unpatched")
PATCHED = Variant("tome", "patched", DiffusionSettings())
SIZE = {"UNet2DConditionModel": 64, "FluxTransformer2DModel": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    found = {}
    for name in SIZE:
        found[name] = tmp_path_factory.mktemp(name)
        config = TINY[name].config if name in TINY else UNET
        (found[name] / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    return found


@pytest.fixture
def benchmark(tmp_path):
    return partial(run_benchmark, tmp_path)


@pytest.fixture(params=SIZE)
def setup(request, folders):
    size = str(SIZE[request.param])
    line = ["--model", str(folders[request.param]), "--size", size, "--device", "cpu"]
    return main.prepare(main.parser().parse_args([*line, "--train-lora"])).setup


def trained(setup, variant: Variant, checkpointing: bool) -> tuple:
    """The model after two steps, what it was before, and the losses."""
    model = setup.denoiser.build(setup.device, setup.dtype)
    before = {name: value.clone() for name, value in model.named_parameters()}
    step = training_step(setup, model, setup.sizes[0], variant, checkpointing)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = [step(), step()]
    return model, before, start, losses


@pytest.mark.parametrize("variant", [UNPATCHED, PATCHED], ids=lambda variant: variant.name)
def test_a_step_trains_the_adapter_and_nothing_else(setup, variant):
    model, before, start, losses = trained(setup, variant, checkpointing=False)
    changed = {
        name for name, value in model.named_parameters() if not torch.equal(value, start[name])
    }
    # The other half of each pair gets no gradient in the first step, since its own half is 0.
    assert {name for name in start if "lora" in name} >= changed
    assert any("lora_B" in name for name in changed)
    assert any("lora_A" in name for name in changed)
    for name, value in before.items():
        frozen = name if name in start else f"{'.base_layer.'.join(name.rsplit('.', 1))}"
        assert torch.equal(start[frozen], value)
    assert losses[0] != losses[1]


def note_attention(ran: list, module, args) -> None:
    if type(module).__name__ in ("Attention", "FluxAttention"):
        ran.append(module)


@pytest.mark.parametrize("variant", [UNPATCHED, PATCHED], ids=lambda variant: variant.name)
def test_checkpointing_computes_blocks_again_and_learns_the_same(setup, variant):
    counts, weights = [], []
    for checkpointing in (False, True):
        ran = []
        handle = register_module_forward_pre_hook(partial(note_attention, ran))
        try:
            model, *_ = trained(setup, variant, checkpointing)
        finally:
            handle.remove()
        counts.append(len(ran))
        weights.append({n: p.detach() for n, p in model.named_parameters() if "lora" in n})
    assert counts[1] == 2 * counts[0]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_a_patched_step_trains_on_fewer_tokens(setup):
    seen = []
    for variant in (UNPATCHED, PATCHED):
        with AttentionRecorder() as attention:
            trained(setup, variant, checkpointing=True)
        seen.append(attention.seen)
    assert len(seen[0]) == len(seen[1])
    assert all(less <= more for more, less in zip(*seen, strict=True))
    assert min(seen[1]) < min(seen[0]) or max(seen[1]) < max(seen[0])


def test_training_leaves_the_global_random_state_alone(setup):
    state = torch.get_rng_state()
    trained(setup, UNPATCHED, checkpointing=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_are_interleaved_and_compared_at_the_same_checkpointing(benchmark, folders, capsys):
    folder = folders["UNet2DConditionModel"]
    record = benchmark(
        *("--model", folder, "--size", 64, "--train-lora", "--rounds", 3, "--no-memory"),
    )
    rows = {(row["variant"], row["checkpointing"]): row for row in record["training"]}
    names = ["unpatched", "tome 0.5"]
    assert list(rows) == [(name, how) for how in (False, True) for name in names]
    assert record["environment"]["batch"] == 1
    for how in (False, True):
        base, row = rows["unpatched", how], rows["tome 0.5", how]
        ratios = [a / b for a, b in zip(base["seconds"], row["seconds"], strict=True)]
        assert row["speedup"]["median"] == pytest.approx(sorted(ratios)[1])
    printed = capsys.readouterr().out
    assert "seconds per step" in printed
    assert printed.count("checkpoints") == 2


def test_each_row_has_the_memory_of_its_own_step_or_an_error(benchmark, folders, monkeypatch):
    asked = []

    def in_child(function, setup, size, variant, checkpointing):
        asked.append((variant.name, checkpointing))
        if len(asked) == 2:
            raise MemoryError("step_peak was killed in its process (exit code -9)")
        return Peak(before=len(asked), peak=10 * len(asked))

    monkeypatch.setattr("benchmarks.speed.lora_training.in_child", in_child)
    record = benchmark(
        *("--model", folders["UNet2DConditionModel"], "--size", 64, "--train-lora"),
        *("--rounds", 1),
    )
    rows = record["training"]
    assert asked == [(row["variant"], row["checkpointing"]) for row in rows]
    assert [row["memory"] and row["memory"]["peak"] for row in rows] == [10, None, 30, 40]
    assert [row.get("error", "")[:20] for row in rows] == ["", "step_peak was killed", "", ""]
    assert ["seconds" in row for row in rows] == [True, False, True, True]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compile"], "--compile must not be given with --train-lora"),
        (["--peer", "tomesd==0.1.3"], "--peer must not be given with --train-lora"),
        (["--cost"], "not allowed with argument"),
        (["--memory"], "not allowed with argument"),
        (["--ratio", "0"], "--ratio must be above 0, got 0.0"),
    ],
)
def test_bad_input_is_named_before_any_work(capsys, args, message):
    assert message in refused(main, ["--train-lora", *args], capsys)


def test_without_peft_the_error_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs peft: pip install peft" in refused(main, ["--train-lora"], capsys)
