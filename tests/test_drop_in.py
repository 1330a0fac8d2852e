"""What ran with tomesd==0.1.3 runs: the calls of its hosts, on tiny models of theirs."""

import ast

import pytest
import torch
from diffusers import LCMScheduler

import tomesd
from tests.support import tiny_ldm
from tests.support.documents import DOCS, examples
from tests.support.tiny_pipelines import sample, sd_pipeline

WEBUI = {"use_rand": False, "merge_attn": True, "merge_crossattn": False, "merge_mlp": False}
# The calls of extensions, whose settings page has all options.
EVERYTHING = {"max_downsample": 2, "sx": 2, "sy": 2, **dict.fromkeys(WEBUI, True)}


class _Diffusers:
    def __init__(self):
        self.sd_model = sd_pipeline()

    def image(self):
        return sample(self.sd_model)


class _CompVis:
    """A1111's: the model object around CompVis's own UNet."""

    def __init__(self):
        self.sd_model = tiny_ldm.LatentDiffusion(tiny_ldm.compvis())

    @torch.no_grad()
    def image(self):
        return tiny_ldm.call(self.sd_model.model.diffusion_model)


@pytest.fixture(scope="module", params=[_Diffusers, _CompVis])
def host(request):
    return request.param()


CALLS = {
    "diffusers' documentation": lambda model: tomesd.apply_patch(model, ratio=0.5),
    "SD.Next": lambda model: tomesd.apply_patch(model, ratio=0.5, **WEBUI),
    "an extension": lambda model: tomesd.apply_patch(model, ratio=0.5, **EVERYTHING),
    "by position": lambda model: tomesd.apply_patch(model, 0.5, 2, 2, 2, True, True, True, True),
    "its README": lambda model: tomesd.apply_patch(model, ratio=0.9, sx=4, sy=4, max_downsample=2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_merges_and_its_removal_restores_the_image(host, call):
    before = host.image()
    assert CALLS[call](host.sd_model) is host.sd_model
    merged = host.image()
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    tomesd.remove_patch(host.sd_model)
    assert torch.equal(host.image(), before)


def test_a_webui_changes_the_ratio_from_image_to_image(host):
    """As A1111's and SD.Next's `apply_token_merging` do."""

    def apply_token_merging(sd_model, token_merging_ratio):
        current = getattr(sd_model, "applied_token_merged_ratio", 0)
        if current == token_merging_ratio:
            return
        if current > 0:
            tomesd.remove_patch(sd_model)
        if token_merging_ratio > 0:
            tomesd.apply_patch(sd_model, ratio=token_merging_ratio, **WEBUI)
        sd_model.applied_token_merged_ratio = token_merging_ratio

    images = {}
    for ratio in (0, 0.5, 0.5, 0.25, 0, 0.5, 0):
        apply_token_merging(host.sd_model, ratio)
        assert torch.equal(images.setdefault(ratio, host.image()), host.image())
    assert not torch.equal(images[0.5], images[0.25])


@pytest.mark.parametrize(
    ("call", "most"),
    [({"ratio": 0.9}, 0.75), ({"ratio": 1.0} | EVERYTHING, 0.75), ({"ratio": 0.9, "sx": 1}, 0.5)],
)
def test_of_a_ratio_above_the_most_all_that_can_merges_with_a_warning(host, call, most):
    with pytest.warns(UserWarning, match=f"at most {most} with these sx and sy, got") as warned:
        tomesd.apply_patch(host.sd_model, **call)
    assert warned[0].filename == __file__
    merged = host.image()
    tomesd.apply_patch(host.sd_model, **call | {"ratio": most})
    assert torch.equal(host.image(), merged)
    tomesd.remove_patch(host.sd_model)


def test_positions_are_those_of_0_1_3():
    pipe = sd_pipeline()
    tomesd.apply_patch(pipe, 0.5, 2, 1, 3, True, True, False, True)
    by_name = tomesd.DiffusionSettings(
        0.5,
        max_downsample=2,
        sx=1,
        sy=3,
        use_rand=True,
        merge_block=False,
        merge_attn=True,
        merge_crossattn=False,
        merge_mlp=True,
    )
    assert pipe.unet._tomesd_patch.settings == by_name


def test_fastsdcpus_latent_consistency_pipeline_merges_on_the_cpu():
    pipe = sd_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    call = {"guidance_scale": 1.0, "num_inference_steps": 2}
    before = sample(pipe, **call)
    tomesd.apply_patch(pipe, ratio=0.5)
    assert not torch.equal(sample(pipe, **call), before)


def test_the_unet_of_a_pipeline_may_be_given_in_its_place():
    pipe = sd_pipeline()
    before = sample(pipe)
    tomesd.apply_patch(pipe.unet, ratio=0.5)
    assert not torch.equal(sample(pipe), before)
    tomesd.remove_patch(pipe)
    assert torch.equal(sample(pipe), before)


def test_the_verbs_are_where_they_were():
    from tomesd.patch import apply_patch, remove_patch

    assert apply_patch is tomesd.apply_patch
    assert remove_patch is tomesd.remove_patch


def test_the_examples_of_the_page_run(host):
    (source,) = examples(DOCS / "coming-from-tomesd.md")
    names = {"sd_model": host.sd_model, "pipe": sd_pipeline()}
    for statement in ast.parse(source).body:
        exec(compile(ast.Module([statement], []), "coming-from-tomesd.md", "exec"), names)
        host.image()
    tomesd.remove_patch(host.sd_model)
