"""A ratio that changes over the steps of a pipeline, in diffusion transformers."""

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch._dynamo.testing import CompileCounterWithBackend

import tomesd
from tests.support.slow import slow
from tests.support.tiny_transformers import TINY
from tomesd import RatioSchedule

NAMES = ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"]


class _Pipeline:
    """A pipeline as far as `apply_patch` knows one: components, and a scheduler that counts."""

    def __init__(self, tiny) -> None:
        self.tiny = tiny
        self.transformer = tiny.build()
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @property
    def components(self) -> dict:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def draw(self, model=None, steps: int = 4) -> list[torch.Tensor]:
        self.scheduler.set_timesteps(steps)
        made = []
        for timestep in self.scheduler.timesteps:
            made.append(self.tiny.call(self.transformer if model is None else model))
            self.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        return made


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_step_is_that_of_its_ratio(name):
    pipe = _Pipeline(TINY[name])
    unpatched = pipe.draw()
    tomesd.apply_patch(pipe, ratio=0.5, preset="steady")
    merged = pipe.draw()
    tomesd.apply_patch(pipe, ratio=RatioSchedule.first(0.5, until=0.5))
    for _ in range(2):
        made = pipe.draw()
        assert all(map(torch.equal, made, merged[:2] + unpatched[2:]))
    note = next(iter(tomesd.report(pipe).rows.values()))[0].note
    assert "ratio 0.5, 0" in note


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_first_step_that_does_not_merge_is_no_cause_for_a_warning(name):
    pipe = _Pipeline(TINY[name])
    tomesd.apply_patch(pipe, ratio=0.5, preset="late")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.draw()


@slow
@torch.no_grad()
def test_a_compiled_transformer_is_compiled_once_for_each_ratio():
    torch.compiler.reset()
    pipe = _Pipeline(TINY["FluxTransformer2DModel"])
    tomesd.apply_patch(pipe, ratio=RatioSchedule.ramp(0.6, 0.1, pieces=4))
    expected = pipe.draw()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    for _ in range(2):
        assert all(map(torch.equal, pipe.draw(compiled), expected))
        assert counter.frame_count == 4


def test_a_ratio_by_level_is_refused_where_there_is_one_level():
    model = TINY["PixArtTransformer2DModel"].build()
    with pytest.raises(TypeError, match="ratio must not be given by level for PixArtTransformer"):
        tomesd.apply_patch(model, ratio={1: 0.5})


def test_a_schedule_without_a_pipeline_is_refused():
    model = TINY["PixArtTransformer2DModel"].build()
    with pytest.raises(TypeError, match="a schedule needs apply_patch"):
        tomesd.apply_patch(model, ratio=RatioSchedule.first(0.5, until=0.5))
