"""Every script's command line: what Ctrl-C and errors print, and which status they end with."""

import runpy
import sys
from argparse import ArgumentParser

import pytest

from benchmarks.common.arguments import Command
from tests.benchmarks.support import ROOT, refused

# Those that are doors to the command `tomesd` are tested with it.
SCRIPTS = [
    script
    for script in sorted((ROOT / "scripts").glob("*.py"))
    if "tomesd.cli" not in script.read_text()
]


def command(prepare=lambda args: args, run=lambda args: None, **options) -> Command:
    return Command("example", lambda parser: None, prepare, run, **options)


def failing(error: type[BaseException]):
    def fail(*args, **kwargs):
        raise error("size must be\na multiple of 8")

    return fail


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_ends_a_script_with_a_sentence_and_status_130(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name])
    monkeypatch.setattr(ArgumentParser, "parse_args", failing(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 130
    printed = capsys.readouterr().err
    assert printed.startswith("stopped: ")
    documented = "same command resumes" in " ".join(script.read_text().split())
    assert ("the same command resumes" in printed) == documented


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_its_docstring_and_a_call(script, capsys, monkeypatch):
    assert len(script.read_text().partition('"""\n\n')[2].splitlines()) <= 4
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert f"usage: {script.name}" in printed
    assert script.read_text().partition('"""')[2].splitlines()[2] in printed


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, ImportError])
def test_a_wrong_argument_is_one_line_and_status_2(error, capsys):
    line = refused(command(prepare=failing(error)), [], capsys)
    assert line.endswith("example.py: error: size must be a multiple of 8")


@pytest.mark.parametrize("resumes", [False, True])
def test_a_failure_ends_with_its_message_and_whether_the_command_resumes(resumes):
    with pytest.raises(SystemExit) as stopped:
        command(run=failing(OSError), resumes=resumes)([])
    assert "a multiple of 8" in stopped.value.code
    assert ("the same command resumes" in stopped.value.code) == resumes


def test_other_exceptions_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        command(run=failing(ZeroDivisionError))([])


def test_the_command_line_is_recorded():
    recorded = []
    command(run=lambda args: recorded.append(args.command))([])
    assert recorded == ["python scripts/example.py"]
