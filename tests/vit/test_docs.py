"""The examples of docs/vision-transformers.md run."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "vision-transformers.md"


def test_the_examples_of_the_page_run():
    torch.manual_seed(0)
    names = {}
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 3
    for source in found:
        exec(source, names)
