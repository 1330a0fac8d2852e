"""ControlNets of diffusion transformers: they merge too, and what they add still fits.

What a ControlNet hands over is of every token, and so is the stream that it is added to, since
tokens merge inside of blocks alone.
"""

import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests.support.recorders import AttentionRecorder, count_hooks
from tests.support.tiny_transformers import CONTROLNETS, TEXT_TOKENS, TINY, TinyTransformer

DENOISERS = (
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "HunyuanDiT2DModel",
)
GRIDS = [(6, 6), (4, 9), (5, 7)]


def _samples(
    tiny: TinyTransformer, controlnet, batch: int, h: int, w: int
) -> tuple[list[Tensor], dict]:
    """What the ControlNet hands over, as arguments of the denoiser too."""
    output = controlnet(**tiny.inputs(batch, h, w), return_dict=False)
    if tiny.name.startswith("Flux"):
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        return output[0] + output[1], dict(zip(names, output, strict=True))
    samples = list(output if tiny.name.startswith("Qwen") else output[0])
    name = "block_controlnet_hidden_states"
    return samples, {name if tiny.name.startswith("SD3") else "controlnet_block_samples": samples}


@pytest.fixture(params=CONTROLNETS)
def tiny(request) -> TinyTransformer:
    return CONTROLNETS[request.param]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@torch.no_grad()
def test_a_controlnet_merges_and_outputs_every_token(tiny, grid):
    controlnet, size = tiny.build(), (2, *grid)
    expected, _ = _samples(tiny, controlnet, *size)
    tomesd.apply_patch(controlnet, ratio=0.5)
    samples, _ = _samples(tiny, controlnet, *size)
    for sample, whole in zip(samples, expected, strict=True):
        assert sample.shape == whole.shape
        assert sample.isfinite().all()
        assert not torch.equal(sample, whole)
    with AttentionRecorder() as attention:
        _samples(tiny, controlnet, *size)
    n = grid[0] * grid[1]
    assert {queries for queries, _ in attention.seen} <= {
        n - n // 2 + text for text in (0, TEXT_TOKENS, TEXT_TOKENS + 1)
    }
    tomesd.remove_patch(controlnet)
    for sample, whole in zip(_samples(tiny, controlnet, *size)[0], expected, strict=True):
        assert torch.equal(sample, whole)
    assert count_hooks(controlnet) == count_hooks(tiny.build())


@torch.no_grad()
def test_a_denoiser_and_its_controlnet_merge_together(tiny):
    """As in a pipeline, where one call patches both."""
    size = (2, 5, 7)
    denoiser = next(TINY[name] for name in DENOISERS if name[:3] == tiny.name[:3])
    model, controlnet = denoiser.build(), tiny.build()
    plain = denoiser.call(model)
    controlled = denoiser.call(model, **_samples(tiny, controlnet, *size)[1])
    assert not torch.equal(controlled, plain)
    both = nn.ModuleDict({"transformer": model, "controlnet": controlnet})
    tomesd.apply_patch(both, ratio=0.5)
    assert set(tomesd.report(both).rows) == {"transformer", "controlnet"}
    merged = denoiser.call(model, **_samples(tiny, controlnet, *size)[1])
    assert merged.shape == controlled.shape
    assert merged.isfinite().all()
    assert not torch.equal(merged, controlled)
    assert not torch.equal(merged, denoiser.call(model))
    tomesd.remove_patch(both)
    assert torch.equal(denoiser.call(model, **_samples(tiny, controlnet, *size)[1]), controlled)
