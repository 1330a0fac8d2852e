"""What happens to a patched transformer later: it is followed, or one is told."""

import inspect
import re

import diffusers
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, ZImageControlNetModel
from torch import nn

import tomesd
from tests.support.tiny_model import randomize_zeros
from tests.support.tiny_transformers import FLUX, PIXART, SD3, TINY, WAN

Z_IMAGE = TINY["ZImageTransformer2DModel"]


def _controlnet(transformer) -> ZImageControlNetModel:
    torch.manual_seed(1)
    sizes = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")
    model = ZImageControlNetModel(
        control_layers_places=[0], control_in_dim=4, **{key: Z_IMAGE.config[key] for key in sizes}
    )
    randomize_zeros(model, std=0.2)
    return ZImageControlNetModel.from_transformer(model.eval(), transformer)


@torch.no_grad()
def test_the_controlnet_of_z_image_shares_blocks_with_a_transformer_that_merges():
    transformer = Z_IMAGE.build()
    controlnet = _controlnet(transformer)
    inputs = Z_IMAGE.inputs()
    given = {"control_context": inputs["x"], **inputs}
    samples = controlnet(**given)
    controlled = Z_IMAGE.call(transformer, controlnet_block_samples=samples)
    plain = Z_IMAGE.call(transformer)
    tomesd.apply_patch(nn.ModuleDict({"transformer": transformer, "controlnet": controlnet}))
    # Before the transformer's first call and after one: it runs as it is.
    for _ in range(2):
        again = controlnet(**given)
        for place, sample in samples.items():
            torch.testing.assert_close(again[place], sample, rtol=0, atol=0)
        merged = Z_IMAGE.call(transformer, controlnet_block_samples=again)
    assert merged.isfinite().all()
    assert not torch.equal(merged, controlled)
    assert not torch.equal(merged, Z_IMAGE.call(transformer))
    tomesd.remove_patch(transformer)
    assert torch.equal(Z_IMAGE.call(transformer), plain)


@pytest.mark.parametrize("name", [FLUX, PIXART, SD3, WAN, "CogVideoXTransformer3DModel"])
@torch.no_grad()
def test_another_model_that_calls_a_block_gets_what_the_block_gives_unpatched(name):
    tiny = TINY[name]
    model = tiny.build()
    block = next(iter(tomesd.apply_patch(model)._tomesd_patch.blocks))
    tomesd.remove_patch(model)
    calls = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    tiny.call(model)
    handle.remove()
    args, kwargs = calls[0]
    expected = block(*args, **kwargs)
    tomesd.apply_patch(model)
    tiny.call(model)
    got = block(*args, **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@torch.no_grad()
def test_rotary_tables_that_another_asks_for_are_the_hosts():
    tiny = TINY[WAN]
    model = tomesd.apply_patch(tiny.build())
    tiny.call(model)
    latents = tiny.inputs()["hidden_states"]
    assert len(model.rope(latents)) == len(tomesd.remove_patch(model).rope(latents))


@torch.no_grad()
def test_an_error_in_the_middle_of_a_forward_leaves_nothing_behind():
    for name in (FLUX, SD3, WAN, "ZImageTransformer2DModel"):
        tiny = TINY[name]
        model = tomesd.apply_patch(tiny.build())
        expected = tiny.call(model)
        last = list(model._tomesd_patch.blocks)[-1]
        child = next(module for module in last.modules() if isinstance(module, nn.Linear))
        handle = child.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.call(model, h=6, w=6)
        handle.remove()
        state = model._tomesd_patch.hooks.state
        assert (state.map, state.x, state.merged, state.bias, state.inside) == (
            *(None,) * 4,
            False,
        )
        assert torch.equal(tiny.call(model), expected)


def test_one_learns_that_blocks_were_replaced():
    model = tomesd.apply_patch(TINY[WAN].build())
    assert "replaced" not in str(tomesd.report(model))
    model.blocks[0] = TINY[WAN].build().blocks[0]
    assert "replaced since: call apply_patch again" in str(tomesd.report(model))
    with pytest.raises(ValueError, match="got a WanTransformerBlock that was added later: call a"):
        TINY[WAN].predict(model)
    assert TINY[WAN].predict(tomesd.apply_patch(model)).isfinite().all()
    assert "replaced" not in str(tomesd.report(model))


def test_klein_with_a_cache_of_keys_is_refused_at_once_and_the_pipeline_that_works_is_named():
    pipe = Flux2KleinKVPipeline.__new__(Flux2KleinKVPipeline)
    with pytest.raises(TypeError, match=r"must not be a Flux2KleinKV.* use Flux2KleinPipeline\("):
        tomesd.apply_patch(pipe)
    own = [inspect.signature(kind.__init__).parameters for kind in (
        Flux2KleinKVPipeline, Flux2KleinPipeline
    )]  # fmt: skip
    assert set(own[0]) <= set(own[1])


def test_z_image_omni_is_refused_at_once_and_pipelines_that_work_are_named():
    pipe = diffusers.ZImageOmniPipeline.__new__(diffusers.ZImageOmniPipeline)
    with pytest.raises(TypeError, match=r"not be a ZImageOmniPipeline: .* ZImagePipeline, .*merge"):
        tomesd.apply_patch(pipe)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Kandinsky5Transformer3DModel", {"attention_type": "nabla"}),
        ("SkyReelsV2Transformer3DModel", {"num_frame_per_block": 3}),
        ("HunyuanVideoTransformer3DModel", {"image_condition_type": "token_replace"}),
    ],
)
def test_what_a_config_tells_is_said_when_patching(name, config):
    model = TINY[name].build(**config)
    ((key, value),) = config.items()
    says = f"nothing would be merged in {name}: its config has {key}={value!r}".replace("'", ".")
    with pytest.raises(ValueError, match=says):
        tomesd.apply_patch(model)


def test_a_cache_is_refused_when_patching():
    model = TINY[FLUX].build()
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="a cache must not be enabled while tokens merge"):
        tomesd.apply_patch(model)
    assert not re.search("tomesd", " ".join(vars(model)))
