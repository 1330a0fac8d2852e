"""`tomesd generate` makes the image that was asked for, or says in one line why not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.support.tiny_shapes import untrained_pipeline
from tomesd.cli.main import main

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
    """Run the command on the tiny model; gives the image, if `path` is one afterwards."""

    def generate(path: Path, *options: str, command: str = "generate") -> Image.Image | None:
        common = ["--model", model, "--device", "cpu", "--steps", "2", "--size", "32"]
        with pytest.raises(SystemExit) as stop:
            main([command, PROMPT, *common, "--output", str(path), *options])
        if stop.value.code:
            raise stop.value
        return Image.open(path) if path.is_file() else None

    return generate


@pytest.fixture
def generate(run, tmp_path):
    return lambda *options, output="out.png", **more: run(tmp_path / output, *options, **more)


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
        "preset": "late",
        "device": "cpu",
        "precision": "fp32",
        "torch_version": torch.__version__.partition("+")[0],
    }
    found = about | {"torch_version": about["torch_version"].partition("+")[0]}
    assert asked_for.items() <= found.items()
    assert {"tomesd_version", "diffusers_version"} <= about.keys()
    assert json.loads(about["merging"])["ratio"] == {"pieces": [[0.2, 0.0], [1.0, 0.25]]}
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
    generate("--report", "--preset", "steady")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1/1", "down_blocks.0", "1", "64", "32", "75.0%"] in rows


def test_comparing_shows_both_methods_at_every_ratio_with_their_times(generate):
    about = (image := generate("--steps", "1", command="compare")).text
    assert json.loads(about["ratios"]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    tome, prune = (json.loads(about[f"seconds_{method}"]) for method in ("tome", "prune"))
    assert len(tome) == len(prune) == 7
    # Unpatched, both rows are one and the same run.
    assert tome[0] == prune[0]
    assert min(tome + prune) > 0
    assert image.width > 7 * 32
    assert image.height > 2 * 32


def test_comparing_the_papers_preset_stops_at_its_largest_ratio(generate):
    about = generate("--steps", "1", "--preset", "paper", command="compare").text
    assert json.loads(about["ratios"])[-1] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0.8"), r"ratio must be at most 0.75, got 0.8"),
        (("--ratio", "1"), r"ratio must be at least 0 and below 1, got 1.0"),
        (("--ratio", "0.6", "--preset", "paper"), r"ratio must be at most 0.5, got 0.6"),
        (("--method", "keep"), r".*'--method': 'keep' is not one of 'tome'"),
        (("--scheduler", "fast"), r".*'--scheduler': 'fast' is not one of 'ddim'"),
        (("--precision", "int8"), r".*'--precision': 'int8' is not one of 'fp32'"),
        (("--device", "tpu"), r"device must be one of cuda, mps, cpu, got 'tpu'"),
        (
            ("--steps", "0"),
            r".*'--steps': must be a whole number from 1 to 1000, got '0'",
        ),
        (
            ("--steps", "2.5"),
            r".*'--steps': must be a whole number from 1 to 1000, got '2.5'",
        ),
        (
            ("--guidance", "nan"),
            r".*'--guidance': must be a number from 0 to 100, got 'nan'",
        ),
        (
            ("--seed", "-1"),
            r".*'--seed': must be a whole number from 0 to \d+, got '-1'",
        ),
        (
            ("--num-images", "0"),
            r".*'--num-images': must be a whole number from 1 to \d+, got '0'",
        ),
        (
            ("--size", "100"),
            r".*'--size': must be one side or WxH in positive multiples of 8 .*'100'",
        ),
        (
            ("--size", "64x64x64"),
            r".*'--size': must be one side or WxH .*got '64x64x64'",
        ),
        (("--output", "a.jpg"), r"output must be a .png file or a folder, got 'a.jpg'"),
        (("--model", "./not/there"), r"model must be .*, a folder or a hub id, got './not/there'"),
        (("--prompts", "prompts.txt"), r"PROMPT or --prompts FILE must be given, got both"),
        (
            ("--since", "1"),
            r".*'--since': must be a number from 0 to 0.999, got '1'",
        ),
        (("--strength", "0.5"), r"strength is allowed with --img2img only, got 0.5"),
        (("--img2img", "none.png"), r"image must be a file, got 'none.png'"),
        (("--save-map", "--ratio", "0"), r"save-map needs a ratio above 0 and .*got --ratio 0"),
        (("--save-map", "--compile"), r"save-map needs .* is not compiled, got --compile"),
        (("--rato", "0.5"), r"No such option '--rato'. Did you mean '--ratio'\?"),
    ],
)
def test_a_bad_argument_is_one_line_before_any_work(generate, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        generate(*options)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.match(f"tomesd generate: error: {message}", line)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_denoiser_that_can_be_patched_is_one_line(tmp_path, capsys, model):
    index = json.loads((Path(model) / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "DiTPipeline"}))
    with pytest.raises(SystemExit) as stop:
        main(["generate", PROMPT, "--model", str(tmp_path)])
    assert stop.value.code == 2
    assert "DiTPipeline" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_that_overflows_is_not_written(generate, model, tmp_path, capsys):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    pipe.save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit) as stop:
        generate("--model", str(tmp_path / "broken"), output="pictures")
    assert stop.value.code == 1
    assert "error: the image is not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "pictures").exists()


def test_each_line_of_a_file_is_a_prompt(generate, model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\na blue star\n")
    common = ["--model", model, "--steps", "1", "--size", "32", "--output", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--prompts", str(prompts), "--num-images", "2", *common])
    assert not stop.value.code
    made = [Image.open(tmp_path / f"a-{index}.png").text for index in range(4)]
    assert [(each["prompt"], each["seed"]) for each in made] == [
        *(("a red heart", "0"), ("a red heart", "1")),
        *(("a blue star", "0"), ("a blue star", "1")),
    ]


def test_since_leaves_the_first_steps_whole(generate):
    late = pixels(generate("--since", "0.5"))
    assert (late != pixels(generate("--preset", "steady"))).any()
    assert (late != pixels(generate("--ratio", "0"))).any()


def test_levels_are_how_many_of_them_merge(generate, capsys):
    generate("--levels", "2", "--report")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1/2", "down_blocks.1", "1", "16", "8", "75.0%"] in rows


def test_an_image_is_the_start_and_the_strength_says_for_how_much(generate, usual, tmp_path):
    start = tmp_path / "start.png"
    Image.linear_gradient("L").save(start)
    little, much = (
        generate("--img2img", str(start), "--strength", strength, "--steps", "4")
        for strength in ("0.25", "1.0")
    )
    assert little.size == much.size == (32, 32)
    assert (little.text["strength"], much.text["strength"]) == ("0.25", "1.0")
    assert (pixels(little) != pixels(much)).any()
    Image.new("RGB", (64, 64), "red").save(start)
    other = generate("--img2img", str(start), "--strength", "0.25", "--steps", "4")
    assert (pixels(other) != pixels(little)).any()


def test_the_map_is_written_beside_the_image_and_does_not_change_it(generate, usual, tmp_path):
    assert (pixels(generate("--save-map")) == usual).all()
    page = Image.open(tmp_path / "out-map.png")
    assert page.text["prompt"] == PROMPT
    assert page.width > 3 * 32


@pytest.mark.slow
def test_a_compiled_denoiser_makes_the_same_image(generate, usual):
    assert abs(pixels(generate("--compile")) - usual).max() <= 1
