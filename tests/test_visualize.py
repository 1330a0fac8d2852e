"""Pictures of merged tokens show the groups that were traced; the script draws what was asked."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import tomesd
from tests.support.tiny_shapes import untrained_pipeline
from tests.support.tiny_vits import build
from tomesd.pictures import token_pages
from tomesd.pictures.token_pages import layers_picture, steps_picture
from tomesd.visualize import draw_frames, draw_groups

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "visualize.py"


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def colors(image: Image.Image, inside: np.ndarray) -> dict[tuple[int, ...], int]:
    """How many pixels of which colour."""
    found, counts = np.unique(np.asarray(image)[inside], axis=0, return_counts=True)
    return {tuple(map(int, c)): int(n) for c, n in zip(found, counts, strict=True)}


def test_every_group_has_the_average_color_of_its_region_and_one_border(picture):
    # 12 px for each patch; the group 0 is in two places.
    patches = torch.tensor([[0, 1, 1], [2, 2, 0]])
    drawn = draw_groups(picture, patches)
    assert drawn.size == picture.size
    pixels = np.asarray(picture).astype(float)
    regions = patches.numpy().repeat(12, 0).repeat(12, 1)
    borders = set()
    for group in range(3):
        inside = regions == group
        (inner, n), (border, _) = sorted(
            colors(drawn, inside).items(), key=lambda item: item[1], reverse=True
        )
        assert np.abs(np.array(inner) - pixels[inside].mean(0)).max() <= 0.5
        assert n > 0.7 * inside.sum()
        borders.add(border)
    assert len(borders) == 3


def test_borders_run_between_groups_only(picture):
    white = Image.new("RGB", picture.size, "white")
    drawn = np.asarray(draw_groups(white, torch.tensor([[0, 0, 1], [0, 0, 1]])))
    columns = (drawn != 255).any(-1)
    assert columns.all(0).nonzero()[0].tolist() == [23, 24]
    assert columns.any(0).nonzero()[0].tolist() == [23, 24]


def test_dropped_patches_are_black(picture):
    drawn = np.asarray(draw_groups(picture, torch.tensor([[-1, 0, -1]])))
    assert not drawn[:, :12].any()
    assert not drawn[:, 24:].any()
    assert drawn[:, 12:24].any(-1).all()


def test_a_group_keeps_its_colors_from_frame_to_frame():
    frames = [Image.new("RGB", (20, 10), color) for color in ("black", "black", "white", "white")]
    # One group that moves, two frames in each patch: its average is over all of them.
    drawn = draw_frames(frames, torch.tensor([[[0, 1]], [[2, 0]]]))
    assert len(drawn) == 4
    left, right = (np.asarray(drawn[i]) for i in (0, 3))
    assert left[5, 2].tolist() == right[5, 17].tolist() == [128, 128, 128]
    assert left[5, 17].tolist() == [0, 0, 0]
    assert left[5, 9].tolist() == right[5, 10].tolist()
    assert (np.asarray(drawn[0]) == np.asarray(drawn[1])).all()


def test_what_cannot_be_drawn_is_refused(picture):
    with pytest.raises(ValueError, match=r"patches must be \[h, w\] for a picture, got \[2, 2, 3"):
        draw_groups(picture, torch.zeros(2, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"patches must be \[t, h, w\] for a video, got \[2, 3\]"):
        draw_frames([picture], torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"no more than the pixels \[1, 24, 36\].*\[1, 25, 3\]"):
        draw_groups(picture, torch.zeros(25, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"frames must all be of one size, got \[\(9, 9\), \(36"):
        draw_frames([picture, picture.resize((9, 9))], torch.zeros(1, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="steps must be among those that merged, none, got 0"):
        steps_picture(picture, [], [0])


@torch.no_grad()
def test_a_page_shows_the_input_and_each_layer_with_its_number_of_tokens(monkeypatch, picture):
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=3)
    with tomesd.trace(vit.model) as traced:
        vit.output()
    pages = []
    monkeypatch.setattr(token_pages, "grid", lambda *args: pages.append(args))
    layers_picture(picture, traced, [0, 2], sample=1)
    cells, _, columns, labels, *_ = pages[0]
    assert columns == ["input", "after layer 0", "after layer 2"]
    assert labels == [["36 tokens", "33 tokens", "27 tokens"]]
    drawn = draw_groups(picture, traced[2].patches[1])
    assert (np.asarray(cells[0][2]) == np.asarray(drawn)).all()


@pytest.fixture(scope="module")
def main():
    command = runpy.run_path(str(SCRIPT))["main"]

    def run(options: list[str]) -> None:
        """As the script does, without ending the process where all went well."""
        try:
            command(["visualize", *options])
        except SystemExit as stopped:
            if stopped.code:
                raise

    return run


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A tiny ViT of transformers as a folder."""
    folder = tmp_path_factory.mktemp("vit")
    build("ViT").model.save_pretrained(folder)
    processor = hf.ViTImageProcessor(size={"height": 24, "width": 24})
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    untrained_pipeline().save_pretrained(folder)
    return str(folder)


def test_a_picture_and_a_drawn_one_become_a_png_with_its_settings(main, classifier, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    out = tmp_path / "out.png"
    options = ["--model", classifier, "--r", "4", "--output", str(out)]
    main(options)
    drawn = Image.open(out)
    assert drawn.text["r"] == "4"
    main([str(tmp_path / "photo.jpg"), *options, "--layers", "0,2"])
    photo = Image.open(out)
    assert photo.text["image"] == "photo.jpg"
    assert (np.asarray(photo) == (254, 0, 0)).all(-1).any()  # as JPEG keeps red
    # The input and three layers, or two: those at 0 and 2 were asked for.
    assert drawn.width > photo.width


def test_a_prompt_draws_steps_and_blocks_of_the_pipeline(main, pipeline, tmp_path, capsys):
    out = tmp_path / "out.png"
    main(["--prompt", "a red heart", "--model", pipeline, "--steps", "2", "--output", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    text = Image.open(out).text
    assert (text["prompt"], text["ratio"], text["steps"]) == ("a red heart", "0.5", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "0"], "must be a whole number from 1 to 10000, got '0'"),
        (["--model", "nowhere"], "model must be timm:<name>, torchvision:<name> or a folder"),
        (["--model", "timm:nothing"], "model must be one that timm knows, got 'timm:nothing'"),
        (["--layers", "3"], "layers must be from 0 to 2, got 3"),
        (["nothing.png"], "image must be a file, got 'nothing.png'"),
        ([str(SCRIPT)], "image must be in an image format, got"),
        (["--ratio", "0.5"], "ratio is allowed with --prompt only, got 0.5"),
        (["--prompt", "a heart", "--r", "4"], "r is not allowed with --prompt, got 4"),
        (["--prompt", "a heart", "--ratio", "0"], "ratio must be above 0"),
        (["--prompt", "a heart", "--ratio", "0.9"], "ratio must be at most 0.75"),
        (["--output", "picture.gif"], "output must be a .png file or a folder"),
    ],
)
def test_bad_input_is_named(main, classifier, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--model", classifier, *options])
    assert stopped.value.code == 2
    assert re.sub(r"\s+", " ", message) in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.png"))
