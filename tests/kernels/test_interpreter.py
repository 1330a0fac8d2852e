"""Kernels are proven on the CPU: the tests in `interpreted/`, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and then nothing else can be compiled:
so these run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.slow import slow, slow_but

pytest.importorskip("triton")
FOLDER = Path(__file__).with_name("interpreted")
NAMES = [file.name for file in sorted(FOLDER.glob("test_*.py"))]


def run(name: str, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-m", marked, str(FOLDER / name)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    none_chosen = 5
    assert done.returncode in (0, none_chosen), done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", slow_but({"test_merging.py"}, NAMES))
def test_in_the_interpreter(name):
    run(name, "not slow")


@slow
@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter_at_length(name):
    run(name, "slow")
