"""What scripts/coverage.py counts as merging."""

import timm
import torch
import transformers as hf

from benchmarks.coverage.models import Covered, cover, table


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
