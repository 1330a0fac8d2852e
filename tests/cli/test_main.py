"""The command's help comes at once, its errors are one line, and scripts/ are doors to it."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import tomesd
from tomesd.cli.main import COMMANDS, group, main

ROOT = Path(__file__).parents[2]

# What takes seconds to import, and --help and a mistyped option can do without.
SLOW = {"torch", "numpy", "PIL", "diffusers", "transformers", "gradio"}
RUN = """
import json, sys
from tomesd.cli.main import main
try:
    main(json.loads(sys.argv[1]))
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "args", [["--help"], *([name, "--help"] for name in COMMANDS), ["generate", "--rato", "1"]]
)
def test_help_and_typos_import_nothing_slow(args):
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if args[-1] == "--help" else 2)
    imported = {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    assert "tomesd" in imported
    assert not imported & SLOW


def test_the_module_runs_as_the_command_does():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tomesd", "--version"], capture_output=True, text=True, check=True
    )
    # A second on an idle machine; imports are what is tested above.
    assert time.perf_counter() - start < 20
    assert done.stdout.strip() == f"tomesd, version {tomesd.__version__}"


def test_every_command_and_option_says_what_it_is_for():
    for name in COMMANDS:
        command = group.get_command(None, name)
        assert command.help
        for option in command.params:
            is_argument = isinstance(option, click.Argument)
            assert is_argument or option.help, f"{name} {option.name}"


def test_the_shell_can_complete_commands_and_choices(monkeypatch):
    def complete(words: str, index: int) -> str:
        variables = {"_TOMESD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": index}
        env = {key: str(value) for key, value in variables.items()}
        return CliRunner().invoke(group, [], prog_name="tomesd", env=env).output

    assert "plain,generate" in complete("tomesd gen", 1)
    assert "plain,quality" in complete("tomesd generate --preset q", 3)


def test_a_missing_package_names_the_extra_that_has_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tomesd.app.serve", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["playground"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "tomesd: error: gradio must be installed: pip install 'tomesd[app]'"


def test_ctrl_c_ends_the_command_with_one_line(monkeypatch, capsys):
    def interrupt(model):
        raise KeyboardInterrupt

    monkeypatch.setattr("tomesd.cli.sizes.denoisers", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["report"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "tomesd: error: stopped; no partial files are left"


@pytest.mark.parametrize(
    ("script", "args", "command"),
    [
        ("generate", ["--help"], "generate"),
        ("generate", ["--compare", "--help"], "compare"),
        ("visualize", ["--help"], "visualize"),
    ],
)
def test_a_script_is_a_door_to_its_command(script, args, command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{script}.py", *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert not stop.value.code
    assert capsys.readouterr().out.startswith(f"Usage: tomesd {command} ")
