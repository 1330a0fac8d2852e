"""What people add to a transformer goes on working while its tokens merge, or is refused.

In one of each kind: joint attention whose keys are given back (SD3) or weighed (Flux), and
cross-attention with positions that were added (PixArt) or rotate (Wan). "before": it was added
before patching.
"""

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tomesd
from tests.tiny_transformers import TINY, Tiny

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
PIXART, WAN = "PixArtTransformer2DModel", "WanTransformer3DModel"
ORDERS = pytest.mark.parametrize("when", ["before", "after"])


@pytest.fixture(params=[SD3, FLUX, PIXART, WAN])
def tiny(request) -> Tiny:
    return TINY[request.param]


@torch.no_grad()
def _predict(tiny: Tiny, model) -> torch.Tensor:
    return tiny.call(model)


def _both_orders(tiny: Tiny, when: str, change) -> Any:
    """A model that merges and to which something was done, before or after patching."""
    model = tiny.model()
    if when == "before":
        change(model)
    tomesd.apply_patch(model)
    if when == "after":
        change(model)
    return model


@pytest.fixture
def _native_backend_afterwards():
    yield
    # Setting one is for the whole process.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@ORDERS
@pytest.mark.usefixtures("_native_backend_afterwards")
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_attention_backend_gives_the_same_output(tiny, backend, when):
    expected = _predict(tiny, tomesd.apply_patch(tiny.model()))
    model = _both_orders(tiny, when, lambda model: model.set_attention_backend(backend))
    torch.testing.assert_close(_predict(tiny, model), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_native_backend_afterwards")
@pytest.mark.parametrize("name", [FLUX, WAN])
def test_a_backend_that_takes_no_bias_needs_merging_without_proportional_attention(name):
    tiny = TINY[name]
    model: Any = tomesd.apply_patch(tiny.model())
    model.set_attention_backend("_native_flash")
    with pytest.raises(ValueError, match="attn_mask"):
        _predict(tiny, model)
    tomesd.apply_patch(model, prop_attn=False)
    flash = _predict(tiny, model)
    model.set_attention_backend("native")
    torch.testing.assert_close(flash, _predict(tiny, model), rtol=0, atol=1e-5)


class _Noting:
    """A processor of a user's own around the model's."""

    def __init__(self, processor):
        self.processor = processor
        self.lengths: list[int] = []

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.lengths.append(hidden_states.shape[1])
        return self.processor(attn, hidden_states, *args, **kwargs)


@ORDERS
def test_a_users_own_attention_processor_sees_merged_tokens(tiny, when):
    expected = _predict(tiny, tomesd.apply_patch(tiny.model()))
    own: list[_Noting] = []

    def change(model) -> None:
        for module in model.modules():
            if hasattr(module, "processor"):
                own.append(_Noting(module.processor))
                module.processor = own[-1]

    # Replaced as an attribute: diffusers' setters look at a processor's signature.
    model = _both_orders(tiny, when, change)
    assert torch.equal(_predict(tiny, model), expected)
    assert own
    lengths = {length for processor in own for length in processor.lengths}
    assert lengths <= {tiny.frames * 18, tiny.frames * 18 + 5}
    assert {module.processor for module in model.modules() if hasattr(module, "processor")} == set(
        own
    )


@ORDERS
@pytest.mark.parametrize("name", [FLUX, PIXART, WAN])
def test_fused_projections_give_the_same_output(name, when):
    tiny = TINY[name]
    expected = _predict(tiny, tomesd.apply_patch(tiny.model()))
    model = _both_orders(tiny, when, lambda model: model.fuse_qkv_projections())
    torch.testing.assert_close(_predict(tiny, model), expected, rtol=0, atol=1e-5)


def _lora() -> LoraConfig:
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False)


def _add_lora(model) -> None:
    model.add_adapter(_lora())


LORA = [(name, when) for name in (SD3, FLUX, WAN) for when in ("before", "after")]


@pytest.mark.parametrize(("name", "when"), LORA)
def test_lora_adapters_may_be_added_before_or_after_and_taken_off_again(name, when):
    tiny = TINY[name]
    bare = _predict(tiny, tiny.model())
    merged = _predict(tiny, tomesd.apply_patch(tiny.model()))
    adapted = tiny.model()
    _add_lora(adapted)
    unpatched = _predict(tiny, adapted)
    expected = _predict(tiny, tomesd.apply_patch(adapted))

    model = _both_orders(tiny, when, _add_lora)
    both = _predict(tiny, model)
    assert torch.equal(both, expected)
    assert not torch.equal(both, merged)
    assert not torch.equal(both, unpatched)
    model.disable_adapters()
    torch.testing.assert_close(_predict(tiny, model), merged, rtol=0, atol=1e-5)
    model.enable_adapters()
    assert torch.equal(_predict(tiny, tomesd.remove_patch(model)), unpatched)
    model.delete_adapters("default")
    assert torch.equal(_predict(tiny, model), bare)


@pytest.mark.parametrize(("name", "when"), LORA)
def test_unloading_lora_leaves_merging_as_it_was(name, when):
    tiny = TINY[name]
    merged = _predict(tiny, tomesd.apply_patch(tiny.model()))
    model = _both_orders(tiny, when, _add_lora)
    model.unload_lora()
    assert torch.equal(_predict(tiny, model), merged)


def test_a_model_inside_a_peft_model_merges():
    """How LoRA is loaded where diffusers has no loader for it."""
    tiny = TINY[PIXART]
    wrapped: Any = get_peft_model(tiny.model(), _lora())
    unpatched = _predict(tiny, wrapped)
    merged = _predict(tiny, tomesd.apply_patch(wrapped))
    assert not torch.equal(merged, unpatched)
    inside: Any = get_peft_model(tomesd.apply_patch(tiny.model()), _lora())
    assert torch.equal(_predict(tiny, inside), merged)
    with inside.disable_adapter():
        expected = _predict(tiny, tomesd.apply_patch(tiny.model()))
        assert torch.equal(_predict(tiny, inside), expected)
    assert torch.equal(_predict(tiny, tomesd.remove_patch(inside)), unpatched)


@ORDERS
def test_weights_quantized_by_torchao_merge(tiny, when):
    def change(model) -> None:
        quantize_(model, Int8WeightOnlyConfig())

    plain = tiny.model()
    exact = _predict(tiny, plain)
    change(plain)
    unpatched = _predict(tiny, plain)
    assert not torch.equal(unpatched, exact)
    expected = _predict(tiny, tomesd.apply_patch(plain))
    model = _both_orders(tiny, when, change)
    merged = _predict(tiny, model)
    assert torch.equal(merged, expected)
    assert not torch.equal(merged, unpatched)
    assert torch.equal(_predict(tiny, tomesd.remove_patch(model)), unpatched)


@ORDERS
def test_weights_stored_in_eight_bits_and_cast_layer_by_layer_merge(tiny, when):
    def change(model) -> None:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

    plain = tiny.model()
    change(plain)
    unpatched = _predict(tiny, plain)
    expected = _predict(tiny, tomesd.apply_patch(plain))
    model = _both_orders(tiny, when, change)
    merged = _predict(tiny, model)
    assert torch.equal(merged, expected)
    assert not torch.equal(merged, unpatched)
    assert torch.equal(_predict(tiny, tomesd.remove_patch(model)), unpatched)


CACHES = [
    FirstBlockCacheConfig(threshold=0.1),
    PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
]


@ORDERS
@pytest.mark.parametrize("config", CACHES, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("name", [FLUX, WAN])
def test_a_cache_is_refused_while_tokens_merge(name, config, when):
    tiny = TINY[name]
    with pytest.raises(ValueError, match="a cache must not be enabled while tokens merge"):
        _predict(tiny, _both_orders(tiny, when, lambda model: model.enable_cache(config)))


def test_a_cache_works_again_without_the_patch():
    tiny = TINY[FLUX]
    model: Any = tomesd.apply_patch(tiny.model())
    model.enable_cache(CACHES[0])
    tomesd.remove_patch(model)
    with model.cache_context("cond"):
        assert _predict(tiny, model).isfinite().all()
