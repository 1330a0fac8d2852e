"""Importing tomesd costs nothing; using it costs an import of torch and nothing else."""

import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import tests
import tomesd
from tomesd import _moved

# Hosts, what they draw in, and what only the scripts and the embedded pipeline need.
OPTIONAL = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "PIL",
    "safetensors",
    "scipy",
    "timm",
    "tokenizers",
    "torchvision",
    "tqdm",
    "transformers",
    "triton",
}

# Some may come with torch itself: only what tomesd adds counts.
WHAT_THE_IMPORT_ADDS = """
import json, sys, torch
before = set(sys.modules)
import tomesd
assert "UNet2DConditionModel" in tomesd.supported()["diffusers"]
tomesd.apply_patch
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def added() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WHAT_THE_IMPORT_ADDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_tomesd_imports_no_host_and_no_optional_library(added):
    packages = {name.partition(".")[0] for name in added}
    assert "tomesd" in packages
    assert not packages & OPTIONAL


def test_importing_tomesd_leaves_the_shapes_world_alone(added):
    assert not [name for name in added if name.startswith("tomesd.shapes")]


def test_importing_tomesd_does_not_import_torch_before_it_is_used():
    check = "import sys, tomesd; assert 'torch' not in sys.modules, 'torch'; tomesd.report"
    subprocess.run([sys.executable, "-c", f"{check}; assert 'torch' in sys.modules"], check=True)


def test_the_public_names_are_exactly_all():
    modules = {name for name in vars(tomesd) if f"tomesd.{name}" in sys.modules}
    public = {name for name in dir(tomesd) if not name.startswith("_")} - modules
    assert public == set(tomesd.__all__) == set(tomesd._MODULES)


def test_the_modules_of_the_package_are_its_attributes():
    assert tomesd.registry.register is tomesd.register
    with pytest.raises(AttributeError, match="module 'tomesd' has no attribute 'merge'"):
        _ = tomesd.merge


@pytest.mark.parametrize("name", tomesd.__all__)
def test_the_documentation_of_every_public_name_opens_with_an_example(name):
    opening = getattr(tomesd, name).__doc__.splitlines()[:4]
    assert any(line.strip().startswith(">>>") for line in opening)


def test_no_installed_package_shadows_the_tests_helpers():
    # Some distributions install a package of this name by accident.
    assert Path(tests.__file__).parent == Path(__file__).parent


@pytest.mark.parametrize(("old", "new"), sorted(_moved._MOVED.items()))
def test_a_module_s_old_name_still_imports_with_a_warning(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    names = vars(importlib.import_module(new))
    assert {name: vars(module)[name] for name in names if name[:2] != "__"} == {
        name: value for name, value in names.items() if name[:2] != "__"
    }
    monkeypatch.delitem(sys.modules, old)
    monkeypatch.delattr(tomesd, old.removeprefix("tomesd."), raising=False)


def test_the_version_is_written_in_one_place():
    assert tomesd.__version__ == version("tomesd")
