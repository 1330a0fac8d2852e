"""`tomesd report` says what merges at each size, from a pipeline's configuration alone."""

import json

import pytest

from tests.support.tiny_transformers import FLUX, TINY
from tomesd.cli.main import main


def run(capsys, *args: str) -> list[list[str]]:
    with pytest.raises(SystemExit) as stop:
        main(["report", *args])
    assert not stop.value.code
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_every_level_of_the_embedded_pipeline_is_listed_at_every_size(capsys):
    title, _, *rows = run(capsys, "--size", "128", "--size", "256x128", "--ratio", "0.25")
    assert title[:2] == ["unet:", "UNet2DConditionModel,"]
    assert [row[:7] for row in rows] == [
        ["128x128", "1/1", "of", "the", "resolution", "3", "1024"],
        ["128x128", "1/2", "of", "the", "resolution", "3", "256"],
        ["128x128", "1/4", "of", "the", "resolution", "4", "64"],
        ["256x128", "1/1", "of", "the", "resolution", "3", "2048"],
        ["256x128", "1/2", "of", "the", "resolution", "3", "512"],
        ["256x128", "1/4", "of", "the", "resolution", "4", "128"],
    ]
    assert [row[7] for row in rows[:3]] == ["768", "192", "48"]


def test_the_estimate_is_the_cost_models_for_that_device(capsys):
    cpu, cuda = (run(capsys, "--size", "128", "--device", each) for each in ("cpu", "cuda"))
    assert cpu[2][-1] == "pays"
    assert cuda[2][-3:] == ["does", "not", "pay"]


def test_a_transformer_has_a_row_for_each_list_of_blocks(capsys, tmp_path):
    model = TINY[FLUX].build()
    model.save_config(tmp_path / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", FLUX]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    title, _, joint, single = run(capsys, str(tmp_path), "--size", "64")
    assert title[1] == f"{FLUX},"
    assert joint[:2] == ["64x64", "transformer_blocks"]
    assert single[:2] == ["64x64", "single_transformer_blocks"]
    assert joint[3:5] == single[3:5] == ["16", "8"]


def test_a_model_that_does_not_merge_is_listed_with_its_reason(capsys, tmp_path):
    from diffusers import SanaTransformer2DModel

    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4}
    tiny = SanaTransformer2DModel(**config, **cross, cross_attention_dim=8, caption_channels=8)
    tiny.save_config(tmp_path / "transformer")
    index = {"transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (line,) = run(capsys, str(tmp_path))
    assert " ".join(line).startswith(
        "transformer: SanaTransformer2DModel, which does not merge: model must not be"
    )


def test_a_pipeline_without_a_denoiser_is_one_line(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Nothing"}))
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: model must have a denoiser, got Nothing without one")
