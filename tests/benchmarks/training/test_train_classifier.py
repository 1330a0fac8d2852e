"""scripts/train_classifier.py trains with merging, measures every r, resumes an interrupted run."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tomesd
from benchmarks.classifier.data import shapes_data
from benchmarks.common.files import settings_folder
from benchmarks.training import architectures, classifier_command, merged_classifier
from benchmarks.training.classifier_command import main
from benchmarks.training.data import LabelledPictures, labelled_pictures
from benchmarks.training.loop import Stage
from benchmarks.training.losses import MaskedClassifier, classifier_loss
from benchmarks.training.merged_classifier import UNTRAINED, TrainingSetup
from tests.benchmarks.support import refused
from tomesd.pictures.classifiers import load_classifier
from tomesd.shapes import names
from tomesd.shapes import pipeline as shapes
from tomesd.shapes.world import scene

FEW = ["--steps", "2", "--batch", "2", "--pictures", "6", "--num-images", "4", "--rounds", "2"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> LabelledPictures:
    config = architectures.build_classifier().config
    return labelled_pictures(6, config, tmp_path_factory.mktemp("pictures"), "cpu")


def setup(drawn: LabelledPictures, steps: int = 1) -> TrainingSetup:
    return TrainingSetup(Stage("", steps, batch=2, lr=1e-3, warmup=1), drawn)


def test_a_model_is_trained_with_its_own_r(drawn, tmp_path):
    trained = {r: setup(drawn).train(r, tmp_path / f"{r}.pt") for r in (0, 28)}
    for r, got in trained.items():
        model = setup(drawn).initial_model()
        tomesd.apply_patch(model, r=r)
        generator = torch.Generator().manual_seed(0)
        classifier_loss(model, drawn, 2, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        weights = [p for p in model.parameters() if p.requires_grad]
        torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01).step()
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(got.state_dict()[name], weight, msg=name)
    assert not torch.equal(trained[0].mask_head.weight, trained[28].mask_head.weight)


def test_all_models_start_with_the_same_weights_in_any_global_random_state(drawn):
    first, again = setup(drawn).initial_model(), setup(drawn).initial_model()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    third = setup(drawn).initial_model()
    assert torch.equal(torch.rand(3), expected)
    for other in (again, third):
        assert all(
            torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
        )
    embedded = load_classifier().model.state_dict()
    assert all(torch.equal(first.classifier.state_dict()[k], v) for k, v in embedded.items())


def test_training_with_merging_learns(drawn, tmp_path):
    def loss(model: MaskedClassifier) -> float:
        with torch.no_grad(), tomesd.patched(model, r=28):
            generator = torch.Generator().manual_seed(99)
            return classifier_loss(model, drawn, 6, generator).item()

    learning = setup(drawn, steps=8)
    assert loss(learning.train(28, tmp_path / "r28.pt")) < 0.9 * loss(learning.initial_model())


def test_the_accuracy_of_each_model_is_measured_with_every_r(drawn, tmp_path, capsys):
    main([*FEW, "--r", "28", "0", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*/results.json")
    results = json.loads(file.read_text())
    names = [UNTRAINED, "0", "28"]
    assert list(results["accuracy"]) == names
    assert {name: len(times) for name, times in results["seconds"].items()} == {"0": 2, "28": 2}
    data = shapes_data(4)
    model = load_classifier().model
    for r in (0, 28):
        with torch.no_grad(), tomesd.patched(model, r=r):
            pixels = torch.stack([pixels_of(data.load(i)) for i in range(4)])
            read = shapes.read(model(pixels).logits)
        right = [answer == tuple(data.labels[i].tolist()) for i, answer in enumerate(read)]
        assert results["accuracy"][UNTRAINED][str(r)] == sum(right) / 4
    printed = capsys.readouterr().out
    assert "2 steps of 2 pictures from the embedded classifier's weights" in printed
    for name in ("off the shelf", "r = 0", "r = 28"):
        assert re.search(rf"^\| {name} \|(.* \|){{4}}$", printed, re.MULTILINE)


def pixels_of(image) -> torch.Tensor:
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(128, 128, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def test_a_resumed_run_measures_nothing_twice(tmp_path, monkeypatch):
    measured, real = [], merged_classifier.accuracy

    def stopped(*args):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(real(*args))
        return measured[-1]

    command = [*FEW, "--r", "0", "28", "--from-scratch", "--output", str(tmp_path)]
    monkeypatch.setattr(merged_classifier, "accuracy", stopped)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    (file,) = tmp_path.glob("*/results.json")
    before = json.loads(file.read_text())
    assert {name: list(read) for name, read in before["accuracy"].items()} == {
        "0": ["0", "28"],
        "28": ["0"],
    }
    calls = []
    monkeypatch.setattr(merged_classifier, "accuracy", lambda *args: calls.append(1) or real(*args))
    main(command)
    after = json.loads(file.read_text())
    assert len(calls) == 1
    assert after["seconds"] == before["seconds"]
    assert after["accuracy"]["0"] == before["accuracy"]["0"]
    assert list(after["accuracy"]["28"]) == ["0", "28"]


def test_results_of_other_weights_machines_or_versions_get_another_folder(tmp_path, monkeypatch):
    (tmp_path / "classifier").mkdir()
    weights = tmp_path / "classifier" / "model.safetensors"
    monkeypatch.setattr(names, "ASSETS", tmp_path)

    def folder(*options: str) -> Path:
        args = main.parser().parse_args(options)
        stage = classifier_command.chosen_stage(args)
        identity = classifier_command.identity(args, stage, torch.device("cpu"))
        return settings_folder(tmp_path, identity)

    weights.write_bytes(b"one")
    first, scratch = folder(), folder("--from-scratch")
    weights.write_bytes(b"another")
    assert folder("--from-scratch") == scratch
    found = {first, scratch, folder()}
    assert len(found) == 3
    monkeypatch.setattr(classifier_command, "device_name", lambda device: "an abacus")
    assert folder() not in found
    found.add(folder())
    monkeypatch.setattr(classifier_command, "versions", lambda *packages: dict.fromkeys(packages))
    assert folder() not in found
    said = json.loads((folder() / "settings.json").read_text())
    assert {"tomesd", "torch", "transformers"} <= said.keys()


def test_the_training_data_are_the_first_scenes(drawn):
    assert drawn.labels.tolist() == [list(scene(index).labels) for index in range(6)]
    assert drawn.images.shape == (6, 3, 128, 128)
    assert drawn.covered.shape[:2] == (6, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "8", "16"], "r must include 0, which the others are compared with, got [8, 16]"),
        (["--r", "-1"], "must be a whole number from 0 to 10000, got '-1'"),
        (["--lr", "2"], "must be a number from 1e-08 to 1, got '2'"),
        (["--steps", "0"], "must be a whole number from 1 to 1000000, got '0'"),
        (["--output", "/proc/x"], "output must be in a writable folder, got '/proc/x'"),
        (["--device", "abacus"], "device must be one of cuda, mps, cpu, got 'abacus'"),
    ],
)
def test_bad_input_is_named_before_any_work(tmp_path, capsys, options, message):
    assert message in refused(main, ["--output", str(tmp_path / "out"), *options], capsys)
    assert not (tmp_path / "out").exists()
