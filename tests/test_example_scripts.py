"""The scripts in examples/ run as they are, on local models instead of those of the hub."""

import runpy
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image

from tests.support.slow import slow
from tests.support.tiny_pipelines import sd_pipeline, sdxl_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


@slow
@pytest.mark.parametrize(("name", "make"), [("sd15", sd_pipeline), ("sdxl", sdxl_pipeline)])
def test_an_example_writes_its_image_and_says_what_merges(
    name, make, tmp_path, monkeypatch, capsys
):
    make().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, "model"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert Image.open(f"{name}.png").width >= 64
    assert "attention saved" in capsys.readouterr().out


@slow
def test_the_example_of_a_classifier_times_it_and_says_what_merges(tmp_path, monkeypatch, capsys):
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["vit", str(tmp_path)])
    with torch.no_grad():  # The script turns gradients off for good.
        runpy.run_path(str(EXAMPLES / "vit.py"))
    printed = capsys.readouterr().out
    assert "with r = 16" in printed
    assert "layer 2" in printed
