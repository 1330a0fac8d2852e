"""Patched models use the kernels, in few launches and in one graph."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tomesd
from tests.kernels.interpreted.support import count_launches, with_kernels
from tests.support import tiny_transformers, tiny_unets, tiny_vits
from tests.support.slow import slow_but
from tomesd.core import merging_work
from tomesd.diffusion.block import add_residual
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.kernels import matching

# Maps depend on rounding where tokens are nearly equally similar, so seeds are fixed.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(model, inputs):
    with torch.no_grad():
        output = model(**inputs, return_dict=False)
    return output[0]


SETTINGS = {
    "default": {},
    "quality": {"preset": "quality"},
    "branches": {"merge_attn": True, "merge_mlp": True},
    "refined": {"refine": 1},
    "pruned": {"method": "prune"},
}


@pytest.mark.parametrize("name", slow_but(["default"], SETTINGS))
def test_a_unet_gives_with_kernels_what_it_gives_without(name):
    unet = tomesd.apply_patch(tiny_unets.sd_unet(), **SETTINGS[name])
    inputs = tiny_unets.unet_inputs(unet, 2, 16, 16)
    expected = run(unet, inputs)
    with with_kernels(), count_launches() as launches:
        got = run(unet, inputs)
    assert launches.kernels
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize(
    "name",
    slow_but(["FluxTransformer2DModel"], ["FluxTransformer2DModel", "SD3Transformer2DModel"]),
)
def test_a_transformer_gives_with_kernels_what_it_gives_without(name):
    tiny = tiny_transformers.TINY[name]
    model = tomesd.apply_patch(tiny.build())
    expected = run(model, tiny.inputs())
    with with_kernels(), count_launches() as launches:
        got = run(model, tiny.inputs())
    assert launches.kernels
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_vit_gives_with_kernels_what_it_gives_without():
    vit = tiny_vits.build("timm")
    model = tomesd.apply_patch(vit.model, r=3)
    with torch.no_grad():
        expected = model(**vit.inputs)
        with with_kernels(), count_launches() as launches:
            got = model(**vit.inputs)
    assert {"match_kernel", "merge_kernel"} <= set(launches.kernels)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_block_s_match_merge_and_unmerge_are_seven_launches_and_no_other_operator():
    settings = DiffusionSettings()
    matcher, x = Matcher(settings), torch.randn(2, 256, 16)
    y = torch.randn(2, 128, 16)
    with with_kernels():
        matcher.token_map(x, 16, 16, 0.5, None)  # Windows are cached from the first block on.
        with count_launches() as launches:
            token_map = matcher.token_map(x, 16, 16, 0.5, None)
            merged = token_map.merge(x)
            add_residual(token_map, x, merged, y)
    assert launches.operators == []
    assert launches.kernels == [
        *("match_kernel", "cut_kernel", "link_kernel", "number_kernel", "join_kernel"),
        *("merge_kernel", "unmerge_kernel"),
    ]


def test_the_cost_model_charges_the_launches_that_there_are():
    matcher, x = Matcher(DiffusionSettings(merge_attn=True)), torch.randn(1, 64, 8)
    fused = merging_work.FUSED
    with with_kernels():
        made = matcher.token_map(x, 8, 8, 0.5, None)
        merged = made.merge(x)
        for charged, call in (
            (fused.match, lambda: matcher.token_map(x, 8, 8, 0.5, None)),
            (fused.merge, lambda: made.merge(x)),
            (fused.merge + fused.norms, lambda: made.merge(x, how="direction")),
            (fused.unmerge, lambda: made.unmerge(merged)),
            (fused.unmerge + fused.residual, lambda: add_residual(made, x, merged, merged)),
        ):
            with count_launches() as launches:
                call()
            assert (len(launches.kernels), launches.operators) == (charged, [])


@pytest.mark.parametrize("trains", slow_but([False], [False, True]))
def test_a_compiled_unet_is_one_graph_with_the_kernels_in_it(trains):
    try:
        torch.library.wrap_triton(matching.cut_kernel)
    except RuntimeError:
        pytest.skip("this torch compiles no kernels of the interpreter")
    torch.compiler.reset()
    unet = tomesd.apply_patch(tiny_unets.sd_unet())
    inputs = tiny_unets.unet_inputs(unet, 1, 8, 8)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    with with_kernels(), nullcontext() if trains else torch.no_grad():
        expected = unet(**inputs, return_dict=False)[0]
        got = compiled(**inputs, return_dict=False)[0]
        if trains:
            unet.requires_grad_(True)
            got.sum().backward()
    assert counter.frame_count == 1
    graph = "\n".join(str(node.target) for node in counter.graphs[0].graph.nodes)
    for name in ("match", "build") if trains else ("match", "build", "merge", "add_residual"):
        assert f"tomesd.{name}" in graph
    torch.testing.assert_close(got, expected, **CLOSE)


def test_removing_the_patch_restores_the_output_bit_for_bit():
    unet = tiny_unets.sd_unet()
    inputs = tiny_unets.unet_inputs(unet, 1, 8, 8)
    with with_kernels():
        before = run(unet, inputs)
        run(tomesd.apply_patch(unet), inputs)
        assert torch.equal(run(tomesd.remove_patch(unet), inputs), before)
