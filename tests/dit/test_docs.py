"""What docs/adding-a-model.md shows is what the project does."""

import re
from pathlib import Path

import torch

import tomesd
from tests.support.recorders import AttentionRecorder
from tests.support.tiny_transformers import TinyTransformer
from tomesd.diffusion.dit.families import cross as diffusers_transformer_cross

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
RECORD, TEST = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_record_in_the_example_is_the_one_that_merges():
    names: dict = {}
    exec(RECORD, names)
    assert names["PIXART"] in diffusers_transformer_cross.FAMILIES


@torch.no_grad()
def test_the_tiny_model_in_the_example_merges():
    names = {"Tiny": TinyTransformer, "TinyTransformer": TinyTransformer, "torch": torch}
    tiny = eval(TEST.strip().rstrip(","), names)
    model = tomesd.apply_patch(tiny.build())
    with AttentionRecorder() as attention:
        assert tiny.call(model).isfinite().all()
    assert attention.seen == [(18, 18), (18, 5)] * 2
