"""The examples of the pages in docs/ that no other test runs."""

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


@pytest.mark.slow
def test_the_training_guide_runs_from_top_to_bottom(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # The Trainer writes checkpoints.
    torch.manual_seed(0)
    *steps, compiled = re.findall(
        r"```python\n(.*?)```", (DOCS / "training.md").read_text("utf-8"), re.DOTALL
    )
    names: dict = {}
    for source in steps:
        exec(source, names)
    # Generating code takes minutes; that there is one graph is known before.
    exec(compiled.replace("fullgraph=True", "fullgraph=True, backend='aot_eager'"), names)
    assert names["model"].get_input_embeddings().projection.weight.grad is not None
