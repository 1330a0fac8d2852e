"""The Shapes world: pictures that repeat, models that build, training that resumes."""

import json
import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.pictures.prompts import held_out
from benchmarks.quality.cases import correct
from benchmarks.training import architectures
from benchmarks.training.data import MASK_CELLS, draw_pictures, masks
from benchmarks.training.loop import Stage, train
from tests.support.slow import slow
from tests.support.tiny_shapes import untrained_pipeline
from tomesd.pictures.sampling import Sampling, sample
from tomesd.shapes import pipeline as shapes
from tomesd.shapes.world import COLORS, HELD_OUT, KINDS, SHAPES, Scene, draw, draw_mask, scene

ROOT = Path(__file__).resolve().parents[1]


def test_the_same_index_is_always_the_same_picture_whatever_the_global_random_state():
    np.random.seed(0)
    first = np.asarray(draw(scene(5)))
    np.random.seed(1)
    assert np.array_equal(first, np.asarray(draw(scene(5))))
    assert not np.array_equal(first, np.asarray(draw(scene(6))))


def test_pictures_differ_in_every_shape_color_kind_and_ground():
    scenes = [scene(index) for index in range(400)]
    assert {s.shape for s in scenes} == set(SHAPES)
    assert {s.color for s in scenes} == {s.ground for s in scenes} == set(COLORS)
    assert {s.kind for s in scenes} == set(KINDS)
    assert all(s.color != s.ground for s in scenes)
    looks = {
        np.asarray(draw(Scene(s, "red", k, "blue"), 32)).tobytes() for s in SHAPES for k in KINDS
    }
    assert len(looks) == len(SHAPES) * len(KINDS)


def test_prompt_and_labels_say_the_same():
    shown = Scene("heart", "red", "striped", "blue")
    assert shown.prompt == "a photo of a red heart on a blue striped background"
    shape, color, kind, ground = shown.labels
    assert (SHAPES[shape], list(COLORS)[color]) == ("heart", "red")
    assert (KINDS[kind], list(COLORS)[ground]) == ("striped", "blue")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_has_its_color_and_the_rest_has_the_grounds(shape):
    shown = Scene(shape, "yellow", "plain", "blue")
    picture = np.asarray(draw(shown)).astype(int)
    mask = np.asarray(draw_mask(shown))
    distance = {name: np.abs(picture - COLORS[name]).sum(-1) for name in ("yellow", "blue")}
    inside, outside = mask == 255, mask == 0
    assert (distance["yellow"] < distance["blue"])[inside].all()
    assert (distance["blue"] < distance["yellow"])[outside].all()
    assert 0.05 < inside.mean() < 0.5


def test_a_scene_looks_the_same_at_every_size():
    large = draw(scene(3), 128).resize((64, 64))
    small = draw(scene(3), 64)
    assert np.abs(np.asarray(large).astype(int) - np.asarray(small)).mean() < 4


def test_held_out_scenes_are_not_trained_on():
    assert HELD_OUT.start > 1_000_000


def test_bad_scene_arguments_are_named():
    with pytest.raises(ValueError, match=r"index must be 0 or more, got -1"):
        scene(-1)
    with pytest.raises(ValueError, match=r"size must be 16 px or more, got 8"):
        draw(scene(0), 8)


def test_every_word_of_the_world_is_one_token_and_every_prompt_fits():
    tokenizer = architectures.build_tokenizer()
    for shape, kind, (color, ground) in product(SHAPES, KINDS, zip(COLORS, COLORS, strict=True)):
        words = Scene(shape, color, kind, ground).prompt.split()
        assert tokenizer.tokenize(" ".join(words)) == [f"{word}</w>" for word in words]
        assert len(words) + 2 <= tokenizer.model_max_length


def test_words_from_outside_the_world_are_spelled_out():
    tokenizer = architectures.build_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("zebra 42!", add_special_tokens=False).input_ids


def test_a_built_pipeline_survives_saving_and_draws(tmp_path):
    pipe = untrained_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    again = shapes.load_pipeline(tmp_path / "pipeline")

    def drawn(pipe):
        pipe.set_progress_bar_config(disable=True)
        return np.asarray(
            pipe("a red ring", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
        )

    assert drawn(again).shape == (128, 128, 3)
    assert np.array_equal(drawn(pipe), drawn(again))


def test_a_missing_asset_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scripts/train_shapes\.py"):
        shapes.load_pipeline(tmp_path / "nowhere")


def test_reading_logits_gives_each_groups_best():
    logits = torch.zeros(1, 28)
    logits[0, [3, 8 + 2, 16 + 1, 20 + 7]] = 5.0
    assert shapes.read(logits) == [(3, 2, 1, 7)]


def test_mask_targets_lie_on_the_classifiers_patches():
    covered = masks([4], patches=16)
    whole = np.asarray(draw_mask(scene(4), 16 * MASK_CELLS))
    assert covered.shape == (1, 256, MASK_CELLS**2)
    assert covered[0, 16 * 5 + 7].tolist() == whole[20:24, 28:32].flatten().tolist()


class _StoppedError(Exception):
    pass


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path):
    """Stopped after 300 of 400 steps, it resumes from the checkpoint at 200."""

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        done = 0

        def loss(generator):
            nonlocal done
            done += 1
            if done == stop_at:
                raise _StoppedError
            return model(torch.randn(8, 3, generator=generator)).square().mean()

        train(Stage("test", steps=400, batch=8, lr=1e-2), model, loss, folder / "model.pt")
        return model.weight, done

    whole, _ = run(tmp_path)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(_StoppedError):
        run(tmp_path, stop_at=300)
    resumed, steps = run(tmp_path)
    assert steps == 200
    assert torch.equal(whole, resumed)


@slow
def test_one_command_trains_all_models_and_resumes_where_it_stopped(tmp_path, capsys):
    script = str(ROOT / "scripts/train_shapes.py")
    options = ["--no-compile", "--precision", "fp32", "--device", "cpu", "--pictures", "8"]
    options += ["--steps-scale", "0.0001", "--output", str(tmp_path / "assets")]
    options += ["--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, script, *options], check=True, capture_output=True, text=True
    )
    assert "half-size:   0%" in done.stderr
    made = {path.name for path in (tmp_path / "assets" / "pipeline").iterdir()}
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"} <= made
    assert not _that_name_folders(tmp_path / "assets")
    unet = tmp_path / "assets/pipeline/unet/diffusion_pytorch_model.safetensors"
    first = unet.read_bytes()
    unet.unlink()
    runpy.run_path(script)["main"]([*options, "--stage", "denoiser"])
    shown = capsys.readouterr().err
    assert "half-size: 100%" in shown
    assert "half-size:   0%" not in shown
    assert unet.read_bytes() == first
    assert shapes.load_classifier(tmp_path / "assets" / "classifier").config.num_labels == 28


def _that_name_folders(root: Path) -> list[Path]:
    configs = {path: json.loads(path.read_text()) for path in root.rglob("*.json")}
    return [path for path, config in configs.items() if config.get("_name_or_path")]


def test_the_assets_do_not_name_the_folders_of_their_maker():
    assert not _that_name_folders(ROOT / "assets")


def test_the_few_step_pipeline_is_told_its_guidance_and_does_not_double_the_batch():
    pipe = shapes.load_pipeline("few-step")
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    pipe.set_progress_bar_config(disable=True)
    batches = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: batches.append(len(args[0])))

    def drawn(guidance: float) -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        call = {"guidance_scale": guidance, "generator": noise, "output_type": "latent"}
        return pipe("a red ring", num_inference_steps=4, **call).images

    assert not torch.equal(drawn(3.0), drawn(5.0))
    assert batches == [1] * 8


@slow
def test_the_embedded_transformer_draws_what_most_prompts_say():
    pipe = shapes.load_pipeline("transformer")
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out(8)
    images = list(sample(pipe, [scene.prompt for scene in scenes], range(8), Sampling(15, 4.0), 8))
    assert sum(correct(images, scenes)) >= 6


def test_an_untrained_student_says_what_its_teacher_says_whatever_the_guidance():
    unet = architectures.build_unet().eval()
    told = architectures.build_few_step_unet(unet).eval()
    noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 96)
    with torch.no_grad():
        expected = unet(noisy, 500, text).sample
        guidance = torch.randn(1, architectures.GUIDANCE_WIDTH)
        assert torch.equal(told(noisy, 500, text, timestep_cond=guidance).sample, expected)


def test_the_transformers_pipeline_draws_at_its_own_size_and_takes_short_prompts(tmp_path):
    transformer = architectures.build_transformer()
    architectures.build_transformer_pipeline(untrained_pipeline(), transformer).save_pretrained(
        tmp_path
    )
    pipe = shapes.load_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    lengths = []
    pipe.transformer.register_forward_pre_hook(
        lambda model, args, given: lengths.append(given["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    image = pipe("a red ring", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert lengths == [16]


def test_the_assets_stay_small():
    total = sum(path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file())
    assert total < 40e6


def test_the_embedded_classifier_reads_pictures_that_it_was_not_trained_on():
    classifier = shapes.load_classifier()
    indices = HELD_OUT[:64]
    with torch.no_grad():
        answers = shapes.read(classifier(draw_pictures(indices, 128).float() / 127.5 - 1).logits)
    right = sum(answer == scene(i).labels for answer, i in zip(answers, indices, strict=True))
    assert right >= 0.9 * len(indices)


@slow
def test_the_embedded_pipeline_shows_what_the_prompt_says_with_half_the_tokens_merged():
    import tomesd

    scenes = [scene(index) for index in HELD_OUT[:8]]
    pipe = tomesd.apply_patch(shapes.load_pipeline(), ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [shown.prompt for shown in scenes],
        num_inference_steps=15,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(i) for i in range(8)],
        output_type="pt",
    ).images
    with torch.no_grad():
        answers = shapes.read(shapes.load_classifier()(images * 2 - 1).logits)
    right = sum(answer == shown.labels for answer, shown in zip(answers, scenes, strict=True))
    assert right >= 6
