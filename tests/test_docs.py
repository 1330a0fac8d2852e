"""What the documentation says runs: its Python blocks, the commands' options, and the notebook."""

import json
import re
from pathlib import Path

import click
import pytest
import torch

import tomesd
from tests.support.tiny_pipelines import sd_pipeline
from tomesd import calibration
from tomesd.cli.main import COMMANDS, group

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"tomesd (\w+)([^`\n]*)")


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall((ROOT / page).read_text()) if kind == language]


@pytest.mark.parametrize("page", ["docs/quick-start.md", "docs/choosing.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, monkeypatch):
    monkeypatch.setattr(calibration, "_RATIOS", (0.25, 0.75))  # A third of the forwards.
    names = {"tomesd": tomesd, "torch": torch, "pipe": sd_pipeline()}
    for code in blocks(page, "python"):
        exec(code, names)


def test_every_command_in_the_documentation_has_the_options_that_it_is_given():
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for name, rest in COMMAND.findall(page.read_text()):
            if name not in COMMANDS:
                continue
            command = group.get_command(click.Context(group), name)
            known = {option for parameter in command.params for option in parameter.opts}
            given = set(re.findall(r"--[\w-]+", rest.partition("#")[0]))
            assert given <= known | {"--help"}, f"{page.name}: tomesd {name}{rest}"


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    cells = json.loads((ROOT / "examples/tour.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["quality"] > 10
