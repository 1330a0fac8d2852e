"""scripts/generate.py makes the picture that was asked for, or says in one line why not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.pictures.generate_command import main
from tests.benchmarks.support import ROOT
from tests.support.tiny_shapes import untrained_pipeline

PROMPT = "a photo of a red heart on a blue striped background"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The embedded pipeline's architecture with random weights."""
    pipe = untrained_pipeline()
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(model):
    """Run the script on the tiny model; gives the picture, if `path` is one afterwards."""

    def generate(path: Path, *options: str) -> Image.Image | None:
        common = ["--model", model, "--device", "cpu", "--steps", "2", "--size", "32"]
        main([PROMPT, *common, "--output", str(path), *options])
        return Image.open(path) if path.is_file() else None

    return generate


@pytest.fixture
def generate(run, tmp_path):
    return lambda *options, output="out.png": run(tmp_path / output, *options)


@pytest.fixture(scope="module")
def usual(run, tmp_path_factory) -> np.ndarray:
    """The picture that is made if no option is given."""
    return pixels(run(tmp_path_factory.mktemp("usual") / "out.png"))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_merging_changes_the_picture_and_ratio_zero_is_the_unpatched_one(generate, usual, model):
    unmerged = pixels(generate("--ratio", "0"))
    assert (unmerged != usual).any()
    pipe = StableDiffusionPipeline.from_pretrained(model)
    plain = pipe(
        PROMPT,
        num_inference_steps=2,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert (unmerged == pixels(plain)).all()


def test_the_same_command_gives_the_same_picture(generate, usual):
    assert (pixels(generate()) == usual).all()


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "1"),
        ("--guidance", "2"),
        ("--steps", "3"),
        ("--scheduler", "euler"),
        ("--method", "prune"),
        ("--preset", "paper"),
        ("--precision", "bf16"),
        ("--size", "40x32"),
    ],
)
def test_every_option_reaches_the_picture(generate, usual, options):
    image = pixels(generate(*options))
    assert image.shape != usual.shape or (image != usual).any()


def test_a_pictures_metadata_are_its_settings(generate, model):
    image = generate("--seed", "4", "--ratio", "0.25", "--size", "40x32", "--guidance", "2")
    about = image.text
    assert image.size == (40, 32)
    asked_for = {
        "prompt": PROMPT,
        "model": model,
        "seed": "4",
        "steps": "2",
        "guidance": "2.0",
        "size": "40x32",
        "scheduler": "DDIMScheduler",
        "ratio": "0.25",
        "method": "tome",
        "preset": "none",
        "device": "cpu",
        "precision": "fp32",
        "torch_version": torch.__version__.partition("+")[0],
    }
    found = about | {"torch_version": about["torch_version"].partition("+")[0]}
    assert asked_for.items() <= found.items()
    assert {"tomesd_version", "diffusers_version"} <= about.keys()
    assert json.loads(about["merging"])["ratio"] == 0.25
    assert float(about["seconds"]) > 0


def test_each_of_several_pictures_can_be_made_again_alone(generate, tmp_path, capsys):
    generate("--num-images", "2", "--seed", "6")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-0.png", "out-1.png"]
    second = Image.open(tmp_path / "out-1.png")
    assert second.text["seed"] == "7"
    assert capsys.readouterr().out.count("out-") == 2
    assert (pixels(generate("--seed", "7")) == pixels(second)).all()


def test_in_a_folder_no_picture_is_replaced(generate, tmp_path, capsys):
    generate(output="pictures")
    generate("--seed", "1", output="pictures")
    written = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in written] == ["00001.png", "00002.png"]
    assert [Image.open(path).text["seed"] for path in written] == ["0", "1"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in printed] == [str(path) for path in written]
    assert all(line.endswith(" s") for line in printed)


def test_the_report_says_where_tokens_merged(generate, capsys):
    generate("--report")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1/1", "down_blocks.0", "1", "64", "32", "75.0%"] in rows


def test_comparing_shows_both_methods_at_every_ratio_with_their_times(generate):
    about = (image := generate("--compare", "--steps", "1")).text
    assert json.loads(about["ratios"]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    tome, prune = (json.loads(about[f"seconds_{method}"]) for method in ("tome", "prune"))
    assert len(tome) == len(prune) == 7
    # Unpatched, both rows are one and the same run.
    assert tome[0] == prune[0]
    assert min(tome + prune) > 0
    assert image.width > 7 * 32
    assert image.height > 2 * 32


def test_comparing_the_papers_preset_stops_at_its_largest_ratio(generate):
    about = generate("--compare", "--steps", "1", "--preset", "paper").text
    assert json.loads(about["ratios"])[-1] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0.8"), r"ratio must be at most 0.75, got 0.8"),
        (("--ratio", "1"), r"ratio must be at least 0 and below 1, got 1.0"),
        (("--ratio", "0.6", "--preset", "paper"), r"ratio must be at most 0.5, got 0.6"),
        (("--method", "keep"), r"--method: invalid choice: 'keep'"),
        (("--scheduler", "fast"), r"--scheduler: invalid choice: 'fast'"),
        (("--precision", "int8"), r"--precision: invalid choice: 'int8'"),
        (("--device", "tpu"), r"device must be one of cuda, mps, cpu, got 'tpu'"),
        (("--steps", "0"), r"--steps: must be a whole number from 1 to 1000, got '0'"),
        (("--steps", "2.5"), r"--steps: must be a whole number from 1 to 1000, got '2.5'"),
        (("--guidance", "nan"), r"--guidance: must be a number from 0 to 100, got 'nan'"),
        (("--seed", "-1"), r"--seed: must be a whole number from 0 to \d+, got '-1'"),
        (("--num-images", "0"), r"--num-images: must be a whole number from 1 to \d+, got '0'"),
        (("--size", "100"), r"--size: must be one side or WxH in positive multiples of 8 .*'100'"),
        (("--size", "64x64x64"), r"--size: must be one side or WxH .*got '64x64x64'"),
        (("--output", "a.jpg"), r"output must be a .png file or a folder, got 'a.jpg'"),
        (("--model", "./not/there"), r"model must be a folder or a hub id, got './not/there'"),
        (("--compare", "--ratio", "0"), r"--ratio is not allowed with --compare"),
        (("--compare", "--num-images", "2"), r"--num-images is not allowed with --compare"),
    ],
)
def test_a_bad_argument_is_one_line_before_any_work(generate, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        generate(*options)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert re.search(f"error: (argument )?{message}", captured.err.splitlines()[-1])
    assert "Loading" not in captured.err
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_denoiser_that_can_be_patched_is_one_line(tmp_path, capsys, model):
    index = json.loads((Path(model) / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "DiTPipeline"}))
    with pytest.raises(SystemExit) as stop:
        main([PROMPT, "--model", str(tmp_path)])
    assert stop.value.code == 2
    assert "DiTPipeline" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_that_overflows_is_not_written(generate, model, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    pipe.save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit, match="the picture is not finite"):
        generate("--model", str(tmp_path / "broken"), output="pictures")
    assert not (tmp_path / "pictures").exists()


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for option in ("--ratio", "--model", "--compare", "--output"):
        assert option in printed


# What takes seconds to import, and --help and a mistyped option can do without.
WHAT_THE_SCRIPTS_IMPORT = """
import runpy, sys
for name in sys.argv[1:]:
    runpy.run_path(name)
slow = {"diffusers", "transformers", "peft", "torchvision", "torch._dynamo", "triton"}
print(*sorted(slow & sys.modules.keys()))
"""


def test_help_and_typos_import_no_model_library():
    scripts = [str(ROOT / "scripts" / f"{name}.py") for name in ("generate", "benchmark")]
    done = subprocess.run(
        [sys.executable, "-c", WHAT_THE_SCRIPTS_IMPORT, *scripts],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stdout.split()
