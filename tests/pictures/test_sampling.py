"""Pictures depend on their own prompt, seed and settings, and on nothing else."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, PNDMScheduler, StableDiffusion3Pipeline

from benchmarks.training import architectures
from tests.support.tiny_shapes import untrained_pipeline
from tests.support.tiny_transformers import TINY
from tomesd.pictures.device import choose_device, choose_precision
from tomesd.pictures.sampling import (
    SCHEDULERS,
    Sampling,
    check_model,
    choose,
    load_pipeline,
    native_side,
    sample,
)
from tomesd.shapes import names

HOW = Sampling(steps=2, guidance=3.0, width=64, height=64)
PROMPTS = ["a red heart", "a blue star", "a green moon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The embedded pipeline's architecture with random weights."""
    pipe = untrained_pipeline()
    place = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(place)
    return str(place)


@pytest.fixture
def pipe(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, prompts, seeds, how=HOW, **settings) -> list[np.ndarray]:
    return [np.asarray(image, dtype=int) for image in sample(pipe, prompts, seeds, how, **settings)]


def test_a_picture_is_the_same_in_any_batch(pipe):
    alone = pictures(pipe, PROMPTS, [5, 6, 7])
    for batch in (2, 3):
        for one, other in zip(alone, pictures(pipe, PROMPTS, [5, 6, 7], batch=batch), strict=True):
            # Up to rounding: one of 256 steps of brightness.
            assert abs(one - other).max() <= 1


def test_a_picture_depends_on_its_own_seed_alone(pipe):
    first = pictures(pipe, PROMPTS, [5, 6, 7])
    torch.manual_seed(1)
    later = pictures(pipe, PROMPTS[1:], [6, 8])
    assert (later[0] == first[1]).all()
    assert (later[1] != first[2]).any()


def test_steps_guidance_and_size_are_the_given_ones(pipe):
    base = pictures(pipe, PROMPTS[:1], [0])[0]
    for other in (Sampling(3, 3.0, 64, 64), Sampling(2, 5.0, 64, 64)):
        assert (pictures(pipe, PROMPTS[:1], [0], other)[0] != base).any()
    wide = pictures(pipe, PROMPTS[:1], [0], Sampling(1, 1.0, width=104, height=72))[0]
    assert wide.shape == (72, 104, 3)


def test_pictures_are_yielded_when_they_are_finished(pipe):
    waiting = sample(pipe, PROMPTS, [0, 1, 2], HOW)
    assert next(waiting).size == (64, 64)
    assert len(list(waiting)) == 2


def test_a_picture_that_overflowed_is_an_error_and_not_a_black_picture(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"not finite in torch.float32 with DDIMScheduler"):
        next(sample(pipe, PROMPTS[:1], [0], HOW))


def test_prompts_without_seeds_and_empty_batches_are_refused_at_once(pipe):
    with pytest.raises(ValueError, match="as many seeds as prompts, got 3 and 1"):
        sample(pipe, PROMPTS, [0], HOW)
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        sample(pipe, PROMPTS, [0, 1, 2], HOW, batch=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_on_the_noise_schedule_that_the_model_was_trained_on(folder, name):
    pipe = load_pipeline(folder, scheduler=name)
    pipe.set_progress_bar_config(disable=True)
    trained_on = architectures.build_scheduler().config
    for setting in ("beta_schedule", "prediction_type", "num_train_timesteps"):
        assert pipe.scheduler.config[setting] == trained_on[setting]
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name][0]
    assert pictures(pipe, PROMPTS[:1], [0])[0].std() > 0


def test_plms_is_the_papers_sampler(folder):
    scheduler = load_pipeline(folder, scheduler="plms").scheduler
    assert isinstance(scheduler, PNDMScheduler)
    assert scheduler.config.skip_prk_steps


def test_without_a_name_the_pipelines_own_scheduler_is_kept(pipe):
    assert isinstance(pipe.scheduler, DDIMScheduler)


def test_the_pipeline_has_the_given_precision(folder):
    pipe = load_pipeline(folder, "cpu", torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_missing_options_are_the_pipelines_defaults(pipe, folder):
    # Those of StableDiffusionPipeline.
    assert choose(pipe, folder) == Sampling(steps=50, guidance=7.5)
    chosen = choose(pipe, folder, steps=3, guidance=0, size=(64, 32))
    assert chosen == Sampling(steps=3, guidance=0, width=64, height=32)
    # The embedded pipeline needs fewer steps and less guidance.
    assert choose(pipe).steps < 50
    assert choose(pipe, guidance=0).guidance == 0


def without_weights(kind, transformer):
    """A pipeline of nothing but its transformer."""
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    return kind(**parts | {"transformer": transformer})


def test_the_native_size_is_the_denoisers_or_the_pipelines(pipe):
    assert native_side(pipe) == 128
    transformer = TINY["SD3Transformer2DModel"].build()
    sd3 = without_weights(StableDiffusion3Pipeline, transformer)
    assert native_side(sd3) == 8 * transformer.config.sample_size
    flux = without_weights(FluxPipeline, TINY["FluxTransformer2DModel"].build())
    assert native_side(flux) == 1024
    del flux.default_sample_size
    with pytest.raises(ValueError, match="size must be given for FluxPipeline, pixels, one side"):
        native_side(flux)


def test_an_impossible_model_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a pipeline's folder.*no model_index.json"):
        check_model(str(tmp_path))
    for wrong in ("./not/there", "two words", "a/b/c"):
        with pytest.raises(ValueError, match=f"unet, few-step, .*a hub id, got '{wrong}'"):
            check_model(wrong)
    check_model("stable-diffusion-v1-5/stable-diffusion-v1-5")


def test_the_error_for_a_missing_embedded_pipeline_names_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python scripts/train_shapes.py"):
        load_pipeline()


def test_an_unknown_scheduler_is_refused(folder):
    with pytest.raises(ValueError, match=r"scheduler must be one of ddim, .*, got 'fast'"):
        load_pipeline(folder, scheduler="fast")


def test_unavailable_devices_are_refused():
    with pytest.raises(ValueError, match="device must be one of cuda, mps, cpu, got 'tpu'"):
        choose_device("tpu")
    with pytest.raises(ValueError, match="device must be available, got 'cuda:99'"):
        choose_device("cuda:99")


def test_the_chosen_device_and_precision_can_compute():
    device = choose_device()
    assert choose_device(str(device)) == device
    assert choose_precision(torch.device("cpu")) == "fp32"
