"""What scripts/coverage.py counts as merging."""

import pytest
import timm
import torch
import transformers as hf

from benchmarks.common.files import read_json
from benchmarks.coverage import models
from benchmarks.coverage.command import main
from benchmarks.coverage.models import Covered, Host, cover, table


def test_a_model_counts_by_the_way_it_merges_or_has_its_reason():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", depth=1)
        sam = timm.create_model("samvit_base_patch16_224", depth=3)
        swin = hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[2]))
    assert cover("timm", "a", vit) == Covered("timm", "a", "VisionTransformer", "for good")
    assert cover("timm", "b", sam) == Covered("timm", "b", "VisionTransformerSAM", "within blocks")
    refused = cover("transformers", "c", swin)
    assert refused.merges == ""
    assert "windows of the token grid" in refused.why


def test_the_table_counts_models_by_the_class_that_is_hooked():
    found = [
        Covered("timm", "a", "Eva", "for good"),
        Covered("timm", "b", "Eva", "for good"),
        Covered("timm", "c", "Swin", "", "windows"),
    ]
    lines = table(found).splitlines()
    assert "| **timm** | **2** | **1 classes** |" in lines
    assert "| Eva | 2 | for good |" in lines
    assert not any("Swin" in line for line in lines)


def test_an_interrupted_count_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    built, stop = [], True

    def build(name):
        built.append(name)
        if name == "no attention":
            return None
        if name == "no config":
            raise TypeError("needs a configuration")
        if stop and name == "c":
            raise KeyboardInterrupt
        return timm.create_model("vit_tiny_patch16_224", depth=1)

    names = ["a", "no attention", "no config", "b", "c"]
    monkeypatch.setitem(models.HOSTS, "timm", Host(lambda: names, build))
    monkeypatch.setattr("benchmarks.coverage.command._SECONDS_BETWEEN_SAVES", 0)
    command = ["--host", "timm", "--output", str(tmp_path), "--reasons"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 130
    stop = False
    main(command)
    assert built == [*names, "c"]
    (file,) = tmp_path.glob("*/results.json")
    rows = read_json(file)["rows"]
    assert [row["name"] for row in rows if row["merges"]] == ["a", "b", "c"]
    printed = capsys.readouterr().out
    assert "timm.no config: not built: TypeError: needs a configuration" in printed
    assert "| **timm** | **3** | **1 classes** |" in printed
