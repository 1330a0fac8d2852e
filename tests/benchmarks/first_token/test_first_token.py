"""What scripts/first_token.py times."""

import torch

from benchmarks.first_token.command import build, first_token, measure, placeholders, table

TINY = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def test_merged_variants_have_the_visual_tokens_that_are_left():
    model = build(32, TINY | {"patch_size": 4}, TINY | {"vocab_size": 64})
    pixels = torch.randn(1, 3, 32, 32)
    assert placeholders(model) == 64
    assert first_token(model, pixels, text=8).shape == (1, 1)
    rows = measure(model, pixels, [4], text=8, rounds=1)
    assert [(row["name"], row["visual_tokens"]) for row in rows] == [
        ("unpatched", 64),
        ("r = 4", 64),
        ("r = 4, unmerge=False", 56),  # Two of three layers: LLaVA does not read the last.
    ]
    assert table(rows).splitlines()[2].startswith("| unpatched | 64 | ")
