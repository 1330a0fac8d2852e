"""The examples of the pages about Vision Transformers run."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "classifiers.md": 1,
    "dense-features.md": 3,
    "detection-and-segmentation.md": 2,
    "audio.md": 1,
    "vision-transformers.md": 1,
}


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_the_page_run(page):
    torch.manual_seed(0)
    names = {}
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == PAGES[page]
    for source in found:
        exec(source, names)
