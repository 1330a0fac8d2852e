"""What scripts/fid.py cannot work with is one clear line, before any picture is made."""

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.fid.command import main
from benchmarks.fid.plan import PRESETS
from benchmarks.pictures.picture_set import parse_methods
from benchmarks.pictures.prompts import load_prompts
from tests.support.tiny_shapes import save_untrained


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("models"))


@pytest.fixture
def refused(models, tmp_path, monkeypatch, capsys):
    """Run the script in an empty folder; gives the line that it stops with."""
    monkeypatch.chdir(tmp_path)
    common = f"--model {models / 'pipeline'} --device cpu --size 32 --steps 1 --num-images 4"

    def run(*options: str) -> str:
        given = [*common.split(), *options]
        if "--features" not in options:
            given += ["--classifier", str(models / "classifier"), "--features", "shapes"]
        with pytest.raises(SystemExit) as stop:
            main(given)
        assert not list((tmp_path / "runs").rglob("*.png"))
        line = capsys.readouterr().err.splitlines()[-1]
        return str(stop.value) if isinstance(stop.value.code, str) else line

    return run


SHAPES = ("--prompts", "shapes", "--reference", "shapes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "shapes", "--reference", "none"), r"reference must be a folder .*'none'"),
        (("--prompts", "shapes"), r"reference must be given for a model other than the embedded"),
        (("--reference", "shapes"), r"prompts must be given for a model other than the embedded"),
        ((*SHAPES, "--num-images", "3"), r"num-images must be 4 or more for the stati.*, got 3"),
        ((*SHAPES, "--num-reference", "3"), r"num-reference must be from 4 to \d+, got 3"),
        ((*SHAPES, "--methods", "keep:0.1"), r"method must be one of tome, prune, got 'keep'"),
        ((*SHAPES, "--methods", "tome"), r"methods must be like tome:0.1,0.5, .*got 'tome'"),
        ((*SHAPES, "--methods", "tome:0.9"), r"ratio must be at most 0.75, got 0.9"),
        ((*SHAPES, "--methods", "tome:0"), r"ratio 0 is unpatched, which is always included"),
        ((*SHAPES, "--methods", "tome:0.5,0.5"), r"each ratio once, got tome 0.5 twice"),
        (
            (*SHAPES, "--patch-preset", "paper", "--methods", "tome:0.6"),
            r"ratio must be at most 0.5, got 0.6",
        ),
        ((*SHAPES, "--scheduler", "fast"), r"--scheduler: invalid choice: 'fast'"),
        ((*SHAPES, "--features", "inception", "--inception-weights", "none"), r"no file none"),
        (
            (*SHAPES, "--features", "shapes", "--inception-weights", "none"),
            r"features must be inception for none, got shapes",
        ),
        (
            (*SHAPES, "--features", "shapes", "--classifier", "none"),
            r"must hold a model, got none",
        ),
        ((*SHAPES, "--output", "table.png"), r"output must be a folder, .* name, 'table.png'"),
        (("--prompts", "none", "--reference", "shapes"), r"prompts must be .* a file, got 'none'"),
    ],
)
def test_a_bad_option_is_one_line_before_any_picture(refused, options, message):
    assert re.search(f"error: (argument )?.*{message}", refused(*options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a heart\n\na star\n  \n", "line 2, 4 is empty"),
        (b"", "all of it is empty"),
        (b"a heart\xff\n", "prompts must be UTF-8 text"),
    ],
)
def test_a_prompts_file_with_empty_lines_is_an_error(refused, tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert message in refused("--prompts", "prompts.txt", "--reference", "shapes")


def test_a_wrong_weights_file_is_an_error(refused, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"none")
    line = refused(*SHAPES, "--features", "inception", "--inception-weights", "weights.pth")
    assert "must be a file of torch-fidelity's InceptionV3, got weights.pth" in line


def test_a_reference_folder_with_too_few_pictures_is_an_error(refused, tmp_path):
    (folder := tmp_path / "few").mkdir()
    assert "reference must hold pictures (.png" in refused(
        "--prompts", "shapes", "--reference", "few"
    )
    for index in range(3):
        Image.new("RGB", (32, 32)).save(folder / f"{index}.png")
    line = refused("--prompts", "shapes", "--reference", "few")
    assert "reference must hold 4 pictures or more, got 3" in line


def test_a_broken_reference_picture_is_named_before_any_picture_is_made(refused, tmp_path):
    (folder := tmp_path / "pictures").mkdir()
    for index in range(5):
        Image.effect_noise((32, 32), 50).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    assert "3.png is broken" in refused("--prompts", "shapes", "--reference", "pictures")


def test_the_papers_preset_is_its_appendix():
    paper = PRESETS["paper"]
    asked = load_prompts(paper["prompts"], paper["num_images"])
    assert len(asked) == 2000
    assert sorted(asked) == sorted(2 * asked[:1000])
    assert asked[0] == "A high quality photograph of a tench."
    methods = parse_methods(paper["methods"], paper["patch_preset"])
    assert [method.name for method in methods[1:]] == (
        ["prune 0.1", "prune 0.2"] + [f"tome 0.{tenth}" for tenth in range(1, 6)]
    )
    for method in methods[1:]:
        assert method.settings.merge_crossattn
        assert method.settings.merge_mlp
        assert method.settings.partition == "alternating"
        assert not method.settings.prop_attn
