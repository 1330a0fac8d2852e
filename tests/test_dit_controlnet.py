"""ControlNets of diffusion transformers: they merge too, and what they add still fits.

What a ControlNet hands over is of every token, and so is the stream that it is added to, since
tokens merge inside of blocks alone.
"""

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests.tiny_models import hooks
from tests.tiny_transformers import TEXT, TINY, WIDTH, Attention

SD3, FLUX = TINY["SD3Transformer2DModel"], TINY["FluxTransformer2DModel"]
GRIDS = [(6, 6), (4, 9), (5, 7)]


def _filled(model: nn.Module) -> nn.Module:
    """What they add starts at zero: nothing of what their blocks do would be seen."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _sd3(**config) -> nn.Module:
    torch.manual_seed(0)
    names = ("sample_size", "patch_size", "in_channels", "out_channels", "num_attention_heads")
    names += ("attention_head_dim", "joint_attention_dim", "caption_projection_dim")
    own = {name: SD3.config[name] for name in (*names, "pooled_projection_dim")}
    own |= {"num_layers": 2, "pos_embed_max_size": 24} | config
    return _filled(diffusers.SD3ControlNetModel(**own))


def _sd3_single() -> nn.Module:
    """As those of Stable Diffusion 3.5: single blocks, given tokens instead of latents."""
    return _sd3(joint_attention_dim=None, use_pos_embed=False)


def _flux() -> nn.Module:
    torch.manual_seed(0)
    return _filled(diffusers.FluxControlNetModel(**FLUX.config))


def _flux_union() -> nn.Module:
    torch.manual_seed(0)
    return _filled(diffusers.FluxControlNetModel(**FLUX.config, num_mode=2))


CASES = [(SD3, _sd3), (SD3, _sd3_single), (FLUX, _flux), (FLUX, _flux_union)]


def _samples(tiny, controlnet, batch: int, h: int, w: int) -> tuple[list[Tensor], dict]:
    """What the ControlNet hands over, as arguments of the denoiser too."""
    draw = torch.Generator().manual_seed(0)
    given = tiny.inputs(batch, h, w, lambda *shape: torch.randn(shape, generator=draw))
    given["controlnet_cond"] = torch.randn(given["hidden_states"].shape, generator=draw)
    if tiny is SD3:
        if controlnet.pos_embed is None:
            given["hidden_states"] = torch.randn(batch, h * w, 16, generator=draw)
            given["encoder_hidden_states"] = None
        samples = controlnet(**given, return_dict=False)[0]
        return samples, {"block_controlnet_hidden_states": samples}
    if controlnet.union:
        given["controlnet_mode"] = torch.ones(batch, 1, dtype=torch.long)
    two, one = controlnet(**given, return_dict=False)
    names = ("controlnet_block_samples", "controlnet_single_block_samples")
    return two + one, dict(zip(names, (two, one), strict=True))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("tiny", "make"), CASES, ids=lambda case: getattr(case, "__name__", ""))
@torch.no_grad()
def test_a_controlnet_merges_and_hands_over_every_token(tiny, make, grid):
    controlnet, size = make(), (2, *grid)
    expected, _ = _samples(tiny, controlnet, *size)
    tomesd.apply_patch(controlnet, ratio=0.5)
    samples, _ = _samples(tiny, controlnet, *size)
    for sample, whole in zip(samples, expected, strict=True):
        assert sample.shape == whole.shape
        assert sample.isfinite().all()
        assert not torch.equal(sample, whole)
    with Attention() as attention:
        _samples(tiny, controlnet, *size)
    n = grid[0] * grid[1]
    assert {queries for queries, _ in attention.seen} <= {
        n - n // 2 + text for text in (0, TEXT, TEXT + 1)
    }
    tomesd.remove_patch(controlnet)
    for sample, whole in zip(_samples(tiny, controlnet, *size)[0], expected, strict=True):
        assert torch.equal(sample, whole)
    assert hooks(controlnet) == hooks(make())


@pytest.mark.parametrize(("tiny", "make"), CASES, ids=lambda case: getattr(case, "__name__", ""))
@torch.no_grad()
def test_a_denoiser_and_its_controlnet_merge_together(tiny, make):
    """As in a pipeline, where one call patches both."""
    size = (2, 5, 7)
    model, controlnet = tiny.model(), make()
    plain = tiny.call(model)
    controlled = tiny.call(model, **_samples(tiny, controlnet, *size)[1])
    assert not torch.equal(controlled, plain)
    both = nn.ModuleDict({"transformer": model, "controlnet": controlnet})
    tomesd.apply_patch(both, ratio=0.5)
    assert set(tomesd.report(both).rows) == {"transformer", "controlnet"}
    merged = tiny.call(model, **_samples(tiny, controlnet, *size)[1])
    assert merged.shape == controlled.shape
    assert merged.isfinite().all()
    assert not torch.equal(merged, controlled)
    assert not torch.equal(merged, tiny.call(model))
    tomesd.remove_patch(both)
    assert torch.equal(tiny.call(model, **_samples(tiny, controlnet, *size)[1]), controlled)


@pytest.mark.parametrize(("tiny", "make"), CASES, ids=lambda case: getattr(case, "__name__", ""))
@torch.no_grad()
def test_merging_one_token_of_a_flat_picture_changes_nothing_that_is_added(tiny, make):
    """Tokens that are alike and have one place: to rounding, all is as without merging."""
    controlnet = make()
    one = torch.randn(1, 1, WIDTH)
    block = controlnet.transformer_blocks[0]
    given = {"hidden_states": one.expand(2, 35, -1).clone(), "temb": torch.randn(2, 16)}
    if make is not _sd3_single:
        given["encoder_hidden_states"] = torch.randn(2, TEXT, 16)
    expected = block(**given)
    tomesd.apply_patch(controlnet, ratio=0.5)
    _samples(tiny, controlnet, 2, 5, 7)
    if tiny is FLUX:
        place = controlnet._tomesd_patch.hooks.last
        tables = (torch.ones(TEXT + 35, 8), torch.zeros(TEXT + 35, 8))
        expected = _unpatched(controlnet, block, given | {"image_rotary_emb": tables})
        given["image_rotary_emb"] = (*tables, place)
    merged = block(**given)
    pairs = (
        [(merged, expected)] if isinstance(merged, Tensor) else zip(merged, expected, strict=True)
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _unpatched(controlnet: nn.Module, block: nn.Module, given: dict) -> tuple:
    with_patch = controlnet._tomesd_patch
    with_patch.remove()
    output = block(**given)
    tomesd.apply_patch(controlnet, ratio=0.5)
    return output
