"""The examples in the docstrings run and give what they say."""

import importlib
from collections import defaultdict
from doctest import DocTest
from pathlib import Path

import pytest

import benchmarks
import tomesd
from tests.support.examples import examples, free_names, modules, run
from tests.support.slow import slow, slow_but
from tomesd import registry

ROOT = Path(__file__).parents[1]
# Examples that do not run as they are written, and why.
# What an example of benchmarks/ may need that is not here. Names of what a run made or was set to:
OF_A_RUN = {
    *("add_options", "x"),
    *("cells", "classifier", "course", "data", "file", "folder", "loss", "measure_one", "measured"),
    *("methods", "model", "output", "paths", "peer", "pixels", "plan", "prompts", "records"),
    *("results", "rows", "scenes", "settings", "setup", "spec", "stage", "todo", "unpatched"),
    *("work", "q", "k", "v", "size", "pictures", "device", "dtype"),
    *("table", "measurement", "ratio_for", "student", "text_encoder"),
}
# Names of other modules, which the example does not import:
OF_ANOTHER_MODULE = {
    *(
        "DiffusionSettings",
        "MODELS",
        "RatioSchedule",
        "SD15",
        "Sampling",
        "StableDiffusionXLPipeline",
    ),
    *(
        "chosen",
        "count",
        "drawn",
        "load_classifier",
        "read_json",
        "sample",
        "shapes_data",
        "shapes",
    ),
    *("unet_inputs", "versions"),
}
# And words in its source:
ELSEWHERE = {
    "from_pretrained": "a model of the hub",
    "timm:": "a model of the hub",
    "stable-diffusion-v1-5/": "a model of the hub",
    '"cuda"': "a GPU",
    "install_peer": "another release, which pip fetches",
    "imagenet/": "a data set",
    "a.png": "a picture of the user's",
    "photo.jpg": "a picture of the user's",
    "serve(": "a server that goes on",
    "main([": "a command, which ends its process",
    "results.csv": "what a run wrote",
    "build_unet(": "gigabytes of weights",
    "with_weights(": "gigabytes of weights",
    "SD15, 2, 64": "gigabytes of weights",
    "Sampling(25": "minutes of drawing",
}


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path, monkeypatch):
    """Files go elsewhere, and what is registered is forgotten."""
    entries = {host: dict(names) for host, names in registry._entries.items()}
    monkeypatch.setattr(registry, "_entries", defaultdict(dict, entries))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)


# In the default run: what users call first.
SAMPLE = {"tomesd.api", "tomesd.tracing", "tomesd.visualize", "tomesd.core.matching"}


@pytest.mark.parametrize("name", slow_but(SAMPLE, modules(tomesd)))
def test_every_example_gives_what_its_docstring_says(name):
    found = examples(importlib.import_module(name))
    # What makes and shows images takes models of the hub and files of the user's, too.
    if name.startswith(("tomesd.app", "tomesd.cli", "tomesd.pictures")):
        found = [test for test in found if _is_runnable(test)]
    failed = _failed(found)
    assert not failed, "\n".join(failed)


@slow
@pytest.mark.parametrize("name", modules(benchmarks))
def test_every_example_of_the_benchmarks_gives_what_its_docstring_says(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "tomesd.merge":
            pytest.skip("code that runs inside of another release")
        raise
    failed = _failed([test for test in examples(module) if _is_runnable(test)])
    assert not failed, "\n".join(failed)


def _failed(tests: list[DocTest]) -> list[str]:
    return [said for test in tests if (said := run(test))]


def _is_runnable(test: DocTest) -> bool:
    source = "".join(example.source for example in test.examples)
    missing = free_names(test) & (OF_A_RUN | OF_ANOTHER_MODULE)
    return not missing and not any(word in source for word in ELSEWHERE)
