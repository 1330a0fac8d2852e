"""The examples of the pages in docs/ that have nothing else to test them run."""

import re
import warnings
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["export.md", "vision-language-models.md"])
def test_the_examples_of_a_page_run(page):
    torch.manual_seed(0)
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        exec(found[0], {})
