"""Every script's command line: Ctrl-C ends it with a sentence, and bad values are named."""

import runpy
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks.common.arguments import run_script

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts").glob("*.py"))


def _stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_ends_a_script_with_what_stays_and_the_usual_status(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name])
    monkeypatch.setattr(ArgumentParser, "parse_args", _stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.type is SystemExit
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("stopped: ")
    # A script says that it goes on where its documentation does.
    documented = "same command goes on" in " ".join(script.read_text().split())
    assert ("the same command goes on" in said) == documented


def test_what_is_not_an_interruption_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: print(1 / 0))
