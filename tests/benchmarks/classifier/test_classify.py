"""scripts/classify.py measures each experiment, resumes interrupted runs, refuses bad input."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import tomesd
from benchmarks.classifier import command, measurements
from benchmarks.classifier.command import main
from benchmarks.classifier.experiments import ABLATION, ALGORITHMS, PARTS, Experiment, experiments
from tests.benchmarks.support import refused
from tests.support.tiny_vits import build
from tomesd.pictures.classifiers import load_classifier

COLORS = ("blue", "green", "red", "white", "yellow")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    build("ViT").model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for color in COLORS:
        (folder / color).mkdir()
        for i in range(2):
            Image.new("RGB", (30 + i, 24), color).save(folder / color / f"{i}.png")
    return folder


@pytest.fixture
def run(model, photos, tmp_path):
    """Runs the script and returns the lines of its table."""

    def classify_photos(*options: str) -> list[dict]:
        common = ["--model", model, "--data", str(photos), "--device", "cpu", "--batch", "4"]
        main([*common, "--output", str(tmp_path), *options])
        (file,) = tmp_path.glob("*/results.csv")
        return list(csv.DictReader(file.open(newline="")))

    return classify_photos


def test_accuracy_is_the_share_of_correct_predictions_of_the_merged_model(run, model, photos):
    lines = run("--parts", "sweep", "--r", "0", "9", "--rounds", "1")
    classifier = load_classifier(model)
    for line, r in zip(lines, (0, 9), strict=True):
        tomesd.apply_patch(classifier.model, r=r)
        right = 0
        for label, color in enumerate(COLORS):
            for i in range(2):
                image = classifier.fit(Image.open(photos / color / f"{i}.png"))
                with torch.no_grad():
                    right += classifier.logits(classifier.prepare([image])).argmax().item() == label
        assert (line["name"], json.loads(line["settings"])) == (f"r = {r}", {"r": r})
        assert float(line["accuracy"]) == right / 10
        assert float(line["images"]) == 10
        ratio = float(line["images_per_second"]) / float(line["unpatched_images_per_second"])
        assert float(line["times_as_fast"]) == pytest.approx(ratio)
    assert float(lines[0]["times_fewer_multiply_adds"]) == 1
    assert float(lines[1]["times_fewer_multiply_adds"]) > 1


def test_every_part_has_its_rows_tables_and_plots(run, tmp_path, capsys):
    lines = run("--r", "0", "3", "--num-schedules", "2", "--rounds", "1")
    names = {part: [line["name"] for line in lines if line["part"] == part] for part in PARTS}
    assert names["sweep"] == ["r = 0", "r = 3"]
    assert names["ablation"] == list(ABLATION)
    assert names["algorithms"] == list(ALGORITHMS)
    assert {"constant 3", "decreasing 3", "random 0", "random 1"} <= set(names["schedules"])
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for part in PARTS[:3] for name in names[part])
    for plot in ("sweep.png", "schedules.png"):
        (file,) = tmp_path.glob(f"*/{plot}")
        Image.open(file).load()


def test_a_resumed_run_measures_nothing_twice_and_loses_nothing(tmp_path):
    file = tmp_path / "results.csv"
    todo = experiments(["sweep", "algorithms"], [0, 3], 3, layers=3, schedules=0)
    asked = []

    def measure_one(experiment: Experiment, stop_at: int) -> dict:
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(experiment.key)
        return {"times_as_fast": 1.0, "times_fewer_multiply_adds": 2.0, "accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        measurements.measure_all(todo, file, partial(measure_one, stop_at=4), rounds=1)
    assert len(measurements.read_records(file)) >= 4
    records = measurements.measure_all(todo, file, partial(measure_one, stop_at=99), rounds=1)
    # Bipartite matching at r = 3 is in both parts.
    assert len(asked) == len(set(asked)) == len(todo) - 1
    assert [(r["part"], r["name"]) for r in records] == [(row.part, row.name) for row in todo]
    # Another part alone measures nothing again, and the others' lines stay.
    measurements.measure_all(todo[2:], file, partial(measure_one, stop_at=0), rounds=1)
    assert len(measurements.read_records(file)) == len(todo)


def test_results_of_other_weights_machines_or_versions_get_another_folder(
    photos, tmp_path, monkeypatch
):
    def folders() -> int:
        classifier.save_pretrained(tmp_path / "model")
        common = ["--model", str(tmp_path / "model"), "--data", str(photos), "--device", "cpu"]
        one = ["--parts", "sweep", "--r", "0", "--rounds", "0"]
        main([*common, *one, "--output", str(tmp_path / "out")])
        return len(list((tmp_path / "out").glob("*/results.csv")))

    classifier = build("ViT").model
    assert [folders(), folders()] == [1, 1]
    torch.nn.init.zeros_(next(classifier.parameters()))
    assert folders() == 2
    monkeypatch.setattr(command, "device_name", lambda device: "an abacus")
    assert folders() == 3
    real = command.versions
    monkeypatch.setattr(command, "versions", lambda *names: dict.fromkeys(real(*names)))
    assert folders() == 4
    (settings,) = [
        found
        for file in (tmp_path / "out").glob("*/settings.json")
        if (found := json.loads(file.read_text()))["torch_version"] is None
    ]
    assert {"tomesd_version", "timm_version", "transformers_version"} <= settings.keys()


def test_random_schedules_are_the_same_every_time_and_merge_no_more_than_the_largest():
    drawn, again = (experiments(["schedules"], [8], 8, layers=12, schedules=20) for _ in "ab")
    assert drawn == again
    totals = [sum(row.options["r"]) for row in drawn if row.name.startswith("random")]
    assert len(totals) == 20
    assert 12 * 2 - 12 <= min(totals) < max(totals) <= 12 * 8 + 12


def test_pictures_are_cropped_to_the_models_size(model):
    classifier = load_classifier(model)
    wide = Image.new("RGB", (96, 48), "blue")
    wide.paste("red", (24, 0, 72, 48))
    fitted = classifier.fit(wide)
    assert fitted.size == (24, 24)
    assert fitted.getpixel((12, 12)) == (255, 0, 0)
    assert fitted.getpixel((2, 12)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "timm:nothing", "--synthetic"], "model must be one that timm knows"),
        (["--synthetic"], "synthetic needs model"),
        (["--model", "timm:vit_tiny_patch16_224"], "data must be given with model='timm:vit_t"),
        (
            ["--model", "MODEL", "--data", "nowhere"],
            "data must be a folder with one for each class",
        ),
        (["--data", "."], "model must be given with data"),
        (["--batch", "0"], "must be a whole number from 1 to 4096, got '0'"),
        (["--r", "-1"], "must be a whole number from 0 to 10000, got '-1'"),
        (["--parts", "table9"], "invalid choice: 'table9'"),
        (["--model", "MODEL", "--data", "FEW", "--output", "/proc/x"], "in a writable folder"),
        (["--device", "abacus"], "device must be one of cuda, mps, cpu, got 'abacus'"),
        (["--model", "MODEL", "--data", "FEW"], "a folder for each of the model's 5 logits, got 1"),
    ],
)
def test_bad_input_is_named_before_any_work(model, tmp_path, capsys, options, message):
    (tmp_path / "few" / "blue").mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "few" / "blue" / "0.png")
    places = {"MODEL": model, "FEW": str(tmp_path / "few")}
    argv = ["--output", str(tmp_path / "out"), *(places.get(each, each) for each in options)]
    assert message in refused(main, argv, capsys)
    assert not (tmp_path / "out").exists()
