"""A compiled UNet stays one graph while tokens merge, and notices when a patch comes or goes."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch._dynamo.testing import CompileCounterWithBackend

import tomesd
from tests.support import tiny_unets
from tests.support.slow import slow, slow_but
from tests.support.tiny_pipelines import build_pipeline, sd_components
from tests.support.tiny_unets import controlnet, predict, unet_inputs

# Three blocks at one level, so that it compiles in seconds.
_ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}

# A single one, where much is compiled.
_ONE_BLOCK = {"up_block_types": ("UpBlock2D",)}

STEPS = [torch.tensor(step) for step in (981, 500, 21)]
EVERYTHING = {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8}
SETTINGS = [
    {},
    {"use_rand": True},
    {"method": "prune", "ratio": np.float64(0.5)},
    {"merge_queries": False},
    {"preset": "paper"},
    {"preset": "quality"},
    {"preset": "fast", "only_where_it_pays": False},
    {"window": 4, "refine": 2},
    EVERYTHING,
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def sd_unet(**config):
    return tiny_unets.sd_unet(**_ONE_LEVEL | config)


def _compile(unet, backend: str = "eager", **options):
    """A compiled UNet, and a counter of the graphs that are compiled."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(unet, backend=counter, fullgraph=True, **options), counter


def _steps(unet) -> list[torch.Tensor]:
    return [predict(unet, timestep=step) for step in STEPS]


def _close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", slow_but([{}], SETTINGS), ids=str)
def test_one_graph_serves_all_steps_and_equals_eager(settings):
    # AOTAutograd's own graph too, which takes as long again, of the most that merges.
    backend = "aot_eager" if settings == EVERYTHING else "eager"
    expected = _steps(tomesd.apply_patch(sd_unet(), **settings))
    unet, counter = _compile(tomesd.apply_patch(sd_unet(), **settings), backend)
    _close(_steps(unet), expected)
    assert counter.frame_count == 1


@slow
def test_a_compiled_unet_of_several_levels_may_be_patched():
    expected = _steps(tomesd.apply_patch(tiny_unets.sd_unet(), **EVERYTHING))
    unet, counter = _compile(tiny_unets.sd_unet())
    assert tomesd.apply_patch(unet, **EVERYTHING) is unet
    _close(_steps(unet), expected)
    assert counter.frame_count == 1


@slow
@pytest.mark.parametrize("in_place", slow_but([False], [False, True]))
def test_a_compiled_unet_that_has_run_notices_a_patch_other_settings_and_its_removal(in_place):
    eager = sd_unet(**_ONE_BLOCK)
    unpatched = _steps(eager)
    with tomesd.patched(eager, ratio=0.5):
        half = _steps(eager)
    with tomesd.patched(eager, ratio=0.25, merge_mlp=True):
        quarter = _steps(eager)

    unet = sd_unet(**_ONE_BLOCK)
    if in_place:
        unet.compile(backend="eager", fullgraph=True)
    else:
        unet, _ = _compile(unet)
    _close(_steps(unet), unpatched)
    _close(_steps(tomesd.apply_patch(unet, ratio=0.5)), half)
    with tomesd.patched(unet, ratio=0.25, merge_mlp=True):
        _close(_steps(unet), quarter)
    _close(_steps(unet), half)
    _close(_steps(tomesd.remove_patch(unet)), unpatched)


@slow
def test_a_patch_on_the_model_inside_a_compiled_one_works():
    eager = sd_unet()
    unpatched = _steps(eager)
    unet, _ = _compile(sd_unet())
    _close(_steps(unet), unpatched)
    tomesd.apply_patch(unet._orig_mod)
    patched = _steps(tomesd.apply_patch(eager))
    torch.compiler.reset()
    _close(_steps(unet), patched)


@slow
def test_a_pipeline_with_a_compiled_unet_makes_the_same_picture():
    def sample(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("a", generator=generator, num_inference_steps=3, output_type="latent").images

    def pipeline():
        components = sd_components(sd_unet()) | {"requires_safety_checker": False}
        return build_pipeline(StableDiffusionPipeline, components)

    eager, pipe = tomesd.apply_patch(pipeline()), pipeline()
    unpatched = sample(pipe)
    pipe.unet, counter = _compile(pipe.unet)
    torch.testing.assert_close(sample(pipe), unpatched, rtol=0, atol=1e-4)
    graphs = counter.frame_count
    assert tomesd.apply_patch(pipe) is pipe
    torch.testing.assert_close(sample(pipe), sample(eager), rtol=0, atol=1e-4)
    # One for the first step, which does not merge, and one for the others.
    assert counter.frame_count == 3 * graphs
    torch.testing.assert_close(sample(tomesd.remove_patch(pipe)), unpatched, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", slow_but([{}], [{}, {"use_rand": True}]), ids=str)
def test_blocks_may_be_compiled_one_by_one(settings):
    expected = _steps(tomesd.apply_patch(sd_unet(), **settings))
    unet = sd_unet()
    unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    _close(_steps(tomesd.apply_patch(unet, **settings)), expected)


@slow
def test_a_compiled_controlnet_merges():
    def run(net):
        picture = torch.zeros(2, 3, 80, 112)
        with torch.no_grad():
            down, middle = net(**unet_inputs(unet), controlnet_cond=picture, return_dict=False)
        return [*down, middle]

    unet = tiny_unets.sd_unet()
    expected = run(tomesd.apply_patch(controlnet(unet)))
    net, counter = _compile(controlnet(unet))
    _close(run(tomesd.apply_patch(net)), expected)
    assert counter.frame_count == 1


@slow
def test_the_report_of_a_compiled_unet_shows_the_sizes_that_ran():
    unet, _ = _compile(tomesd.apply_patch(sd_unet()))
    predict(unet, h=10, w=14)
    (rows,) = tomesd.report(unet).rows.values()
    assert [(row.tokens, row.merged) for row in rows] == [(140, 70), (140, 70)]


@slow
def test_other_sizes_compile_too():
    eager = tomesd.apply_patch(sd_unet(), use_rand=True)
    unet, _ = _compile(tomesd.apply_patch(sd_unet(), use_rand=True), dynamic=False)
    for h, w in [(10, 14), (14, 10)]:
        _close([predict(unet, h=h, w=w)], [predict(eager, h=h, w=w)])


@slow
def test_a_compiled_unet_trains():
    def gradients(model, unet):
        unet.zero_grad()
        model(**unet_inputs(unet)).sample.square().mean().backward()
        return [parameter.grad for parameter in unet.parameters()]

    unet = tomesd.apply_patch(sd_unet().train(), use_rand=True, **EVERYTHING)
    expected = gradients(unet, unet)
    compiled, counter = _compile(unet, "aot_eager")
    _close(gradients(compiled, unet), expected)
    assert counter.frame_count == 1


@slow
def test_a_compiled_unet_trains_with_checkpointing():
    unet = tomesd.apply_patch(sd_unet().train(), use_rand=True)
    inputs = unet_inputs(unet)
    unet(**inputs).sample.square().mean().backward()
    expected = [parameter.grad for parameter in unet.parameters()]
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    # Not as one graph: a block that is checkpointed may not hand its hooks' map on.
    compiled = torch.compile(unet, backend="eager")
    compiled(**inputs).sample.square().mean().backward()
    _close([parameter.grad for parameter in unet.parameters()], expected)


@slow
def test_the_default_compiler_gives_what_eager_gives():
    settings = {"use_rand": True, "merge_mlp": True}
    expected = _steps(tomesd.apply_patch(sd_unet(**_ONE_BLOCK), **settings))
    unet = tomesd.apply_patch(sd_unet(**_ONE_BLOCK), **settings)
    unet.compile_repeated_blocks(fullgraph=True)
    _close(_steps(unet), expected)


@slow
def test_levels_that_are_left_alone_compile_too():
    settings = {"preset": "fast", "min_tokens": 100}
    expected = _steps(sd_unet())
    with pytest.warns(UserWarning, match="nothing merges"):
        _close(_steps(tomesd.apply_patch(sd_unet(), **settings)), expected)
    unet, counter = _compile(tomesd.apply_patch(sd_unet(), **settings))
    _close(_steps(unet), expected)
    assert counter.frame_count == 1


@slow
def test_a_processor_of_ones_own_compiles_to_one_graph_if_it_was_there_before():
    class Own:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)

    unet = sd_unet()
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(Own())
    expected = _steps(tomesd.apply_patch(unet))
    compiled, counter = _compile(unet)
    _close(_steps(compiled), expected)
    assert counter.frame_count == 1
    unet.set_attn_processor(AttnProcessor2_0())
    _close(_steps(compiled), _steps(tomesd.apply_patch(sd_unet())))
