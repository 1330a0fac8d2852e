"""Merging keeps its promises in every pipeline of diffusers, or is refused in time with the reason.

At two sizes, one of them odd, and with the default settings and at all levels: the output is finite
and of the right shape, attention has fewer logits, two runs are equal, and removing the patch gives
the output of before bit for bit. `python -m tests.pipelines` makes the table in the docs of it.
"""

import diffusers
import pytest

from benchmarks.results.files import load
from tests.support.pipelines import FAMILIES, NOT_TRIED, verdict
from tests.support.slow import slow_but

# One of each kind of denoiser, and of what pipelines do around it.
SAMPLE = {
    *("StableDiffusionPipeline", "StableDiffusionControlNetInpaintPipeline"),
    *("StableDiffusionXLInpaintPipeline", "StableDiffusionPAGPipeline"),
    *("AnimateDiffControlNetPipeline", "StableVideoDiffusionPipeline"),
    *("FluxControlNetPipeline", "Flux2KleinPipeline", "StableDiffusion3InpaintPipeline"),
    *("QwenImageInpaintPipeline", "PixArtSigmaPipeline", "HunyuanDiTControlNetPipeline"),
    *("ZImageControlNetPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    *("LTXConditionPipeline", "CogVideoXImageToVideoPipeline", "HunyuanVideoPipeline"),
    *("SanaPipeline", "HunyuanVideoFramepackPipeline"),
}


@pytest.mark.parametrize("name", slow_but(SAMPLE, FAMILIES))
def test_merging_keeps_its_promises_in_the_pipeline_or_is_refused_with_the_reason(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    found = verdict(name, FAMILIES[name])
    assert not found.fault
    # The table in the docs says the same.
    rows = {row["name"]: row for row in load("pipelines")["rows"]}
    assert (list(found.merged), found.refusal) == (rows[name]["merged"], rows[name]["refusal"])


def test_every_pipeline_of_diffusers_is_tried_or_left_out_with_a_reason():
    # What is not installed is known by its name alone.
    known = {name for name in dir(diffusers) if "Pipeline" in name}
    pipelines = {
        name
        for name in known
        if _is_pipeline(name) and name not in ("DiffusionPipeline", "AudioPipelineOutput")
    }
    assert pipelines <= set(FAMILIES) | set(NOT_TRIED)
    assert not set(FAMILIES) & set(NOT_TRIED)
    assert sum(bool(row["merged"]) for row in load("pipelines")["rows"]) >= 150


def _is_pipeline(name: str) -> bool:
    kind = getattr(diffusers, name, None)
    return isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
