"""A patched diffusion transformer compiles to one graph, and gives what it gives uncompiled."""

import copy

import pytest
import torch

import tomesd
from tests.support.slow import slow, slow_but
from tests.support.tiny_transformers import TINY
from tomesd import registry

# Where diffusers' own forward looks at values, unpatched too.
BROKEN_BY_THE_HOST = {
    "BriaFibo2Transformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
    "OmniGenTransformer2DModel",
    "ZImageTransformer2DModel",
}


# Models of one spec are hooked alike.
# The first, which the sample is of: the last of equal keys wins.
ONE_OF_EACH = list({registry.find(TINY[name].build()): name for name in reversed(TINY)}.values())


# Joint attention, and single-stream blocks too.
SAMPLE = {"SD3Transformer2DModel", "FluxTransformer2DModel"}


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", slow_but(SAMPLE, ONE_OF_EACH))
@torch.no_grad()
def test_a_patched_model_compiles_to_one_graph(name):
    tiny = TINY[name]
    model = tiny.build()
    if name in BROKEN_BY_THE_HOST:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            tiny.call(torch.compile(model, fullgraph=True, backend="eager"))
        return
    tomesd.apply_patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tiny.call(compiled), tiny.call(model))


@slow
@torch.no_grad()
def test_image_ids_are_read_while_compiling():
    """Flux's grid is read from its image ids, also while it is compiled."""
    tiny = TINY["FluxTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for h, w in ((4, 9), (5, 7)):
        assert torch.equal(tiny.call(compiled, h=h, w=w), tiny.call(model, h=h, w=w))


def _wrapped(model, **how):
    return torch.compile(model, **how)


def _in_place(model, **how):
    model = copy.deepcopy(model)
    model.compile(**how)
    return model


@slow
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("FluxTransformer2DModel", _wrapped),
        ("FluxTransformer2DModel", _in_place),
        ("Flux2Transformer2DModel", _wrapped),
    ],
)
@torch.no_grad()
def test_another_grid_with_the_same_number_of_tokens_is_noticed(name, compiled):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build())
    own = compiled(model, fullgraph=True, backend="eager")
    for h, w in ((4, 9), (9, 4), (4, 9)):
        assert torch.equal(tiny.call(own, h=h, w=w), tiny.call(model, h=h, w=w))


class _Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.dtype = model, model.dtype

    def forward(self, **given):
        return self.model(**given)


@slow
@torch.no_grad()
def test_a_model_inside_of_what_is_compiled_is_in_the_one_graph():
    tiny = TINY["FluxTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build())
    compiled = torch.compile(_Around(model), fullgraph=True, backend="eager", dynamic=False)
    for h, w in ((4, 9), (5, 7)):
        assert torch.equal(tiny.call(compiled, h=h, w=w), tiny.call(model, h=h, w=w))


@slow
@torch.no_grad()
def test_the_patch_may_come_and_go_after_compiling():
    tiny = TINY["SD3Transformer2DModel"]
    model = tiny.build()
    plain = tiny.call(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tiny.call(compiled), plain)
    tomesd.apply_patch(compiled, ratio=0.5)
    assert torch.equal(tiny.call(compiled), tiny.call(model))
    assert not torch.equal(tiny.call(compiled), plain)
    tomesd.remove_patch(compiled)
    assert torch.equal(tiny.call(compiled), plain)


@slow
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
@torch.no_grad()
def test_blocks_may_be_compiled_one_by_one(name):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build())
    expected = tiny.call(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(tiny.call(model), expected)
