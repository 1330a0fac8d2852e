"""What people add to a transformer still works while its tokens merge, or is refused.

"before": it was added before patching.
"""

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tomesd
from tests.support.recorders import RecordingProcessor
from tests.support.tiny_transformers import FLUX, KINDS, PIXART, SD3, TINY, WAN, TinyTransformer

ORDERS = pytest.mark.parametrize("when", ["before", "after"])


@pytest.fixture(params=KINDS)
def tiny(request) -> TinyTransformer:
    return TINY[request.param]


@pytest.fixture
def _native_backend_afterwards():
    yield
    # Setting one is for the whole process.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@ORDERS
@pytest.mark.usefixtures("_native_backend_afterwards")
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_attention_backend_gives_the_same_output(tiny, backend, when):
    expected = tiny.predict(tomesd.apply_patch(tiny.build()))
    model = tiny.patched(when, lambda model: model.set_attention_backend(backend))
    torch.testing.assert_close(tiny.predict(model), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_native_backend_afterwards")
@pytest.mark.parametrize("name", [FLUX, WAN])
def test_a_backend_that_takes_no_bias_needs_merging_without_proportional_attention(name):
    tiny = TINY[name]
    model: Any = tomesd.apply_patch(tiny.build())
    model.set_attention_backend("_native_flash")
    with pytest.raises(ValueError, match="attn_mask"):
        tiny.predict(model)
    tomesd.apply_patch(model, prop_attn=False)
    flash = tiny.predict(model)
    model.set_attention_backend("native")
    torch.testing.assert_close(flash, tiny.predict(model), rtol=0, atol=1e-5)


@ORDERS
def test_a_users_own_attention_processor_sees_merged_tokens(tiny, when):
    expected = tiny.predict(tomesd.apply_patch(tiny.build()))
    own: list[RecordingProcessor] = []

    def change(model) -> None:
        for module in model.modules():
            if hasattr(module, "processor"):
                own.append(RecordingProcessor(module.processor))
                module.processor = own[-1]

    # Replaced as an attribute: diffusers' setters look at a processor's signature.
    model = tiny.patched(when, change)
    # Where they can be, keys are unmerged for it instead of weighed: the same but for rounding.
    torch.testing.assert_close(tiny.predict(model), expected, rtol=0, atol=1e-5)
    assert own
    lengths = {length for processor in own for length, _ in processor.seen}
    assert lengths <= {tiny.frames * 18, tiny.frames * 18 + 5}
    assert {module.processor for module in model.modules() if hasattr(module, "processor")} == set(
        own
    )


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (PIXART, "keys unmerged for RecordingProcessor"),
        (FLUX, "RecordingProcessor must add the mask it is given to its logits"),
    ],
)
def test_the_report_says_what_a_users_own_processor_means_for_keys(name, note):
    tiny = TINY[name]
    model = tomesd.apply_patch(tiny.build())
    tiny.predict(model)
    ((stock, *_),) = tomesd.report(model).rows.values()
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor = RecordingProcessor(module.processor)
    tiny.predict(model)
    ((row, *_),) = tomesd.report(model).rows.values()
    assert (stock.note, row.note) == ("", note)
    assert row.work == pytest.approx(stock.work ** (0.5 if name == PIXART else 1))
    tomesd.apply_patch(model, prop_attn=False)
    assert "RecordingProcessor" not in str(tomesd.report(model))


@ORDERS
@pytest.mark.parametrize("name", [FLUX, PIXART, WAN])
def test_fused_projections_give_the_same_output(name, when):
    tiny = TINY[name]
    expected = tiny.predict(tomesd.apply_patch(tiny.build()))
    model = tiny.patched(when, lambda model: model.fuse_qkv_projections())
    torch.testing.assert_close(tiny.predict(model), expected, rtol=0, atol=1e-5)


def _lora() -> LoraConfig:
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False)


def _add_lora(model) -> None:
    model.add_adapter(_lora())


LORA = [(name, when) for name in (SD3, FLUX, WAN) for when in ("before", "after")]


@pytest.mark.parametrize(("name", "when"), LORA)
def test_lora_adapters_may_be_added_before_or_after_and_removed_again(name, when):
    tiny = TINY[name]
    bare = tiny.predict(tiny.build())
    merged = tiny.predict(tomesd.apply_patch(tiny.build()))
    adapted = tiny.build()
    _add_lora(adapted)
    unpatched = tiny.predict(adapted)
    expected = tiny.predict(tomesd.apply_patch(adapted))

    model = tiny.patched(when, _add_lora)
    both = tiny.predict(model)
    assert torch.equal(both, expected)
    assert not torch.equal(both, merged)
    assert not torch.equal(both, unpatched)
    model.disable_adapters()
    torch.testing.assert_close(tiny.predict(model), merged, rtol=0, atol=1e-5)
    model.enable_adapters()
    assert torch.equal(tiny.predict(tomesd.remove_patch(model)), unpatched)
    model.delete_adapters("default")
    assert torch.equal(tiny.predict(model), bare)


@pytest.mark.parametrize(("name", "when"), LORA)
def test_unloading_lora_leaves_merging_as_it_was(name, when):
    tiny = TINY[name]
    merged = tiny.predict(tomesd.apply_patch(tiny.build()))
    model = tiny.patched(when, _add_lora)
    model.unload_lora()
    assert torch.equal(tiny.predict(model), merged)


def test_a_model_inside_a_peft_model_merges():
    """How LoRA is loaded where diffusers has no loader for it."""
    tiny = TINY[PIXART]
    wrapped: Any = get_peft_model(tiny.build(), _lora())
    unpatched = tiny.predict(wrapped)
    merged = tiny.predict(tomesd.apply_patch(wrapped))
    assert not torch.equal(merged, unpatched)
    inside: Any = get_peft_model(tomesd.apply_patch(tiny.build()), _lora())
    assert torch.equal(tiny.predict(inside), merged)
    with inside.disable_adapter():
        expected = tiny.predict(tomesd.apply_patch(tiny.build()))
        assert torch.equal(tiny.predict(inside), expected)
    assert torch.equal(tiny.predict(tomesd.remove_patch(inside)), unpatched)


def _quantized(model) -> None:
    quantize_(model, Int8WeightOnlyConfig())


def _cast(model) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


@ORDERS
@pytest.mark.parametrize("change", [_quantized, _cast])
def test_eight_bit_weights_merge(tiny, change, when):
    """Quantized by torchao, or stored in eight bits and cast layer by layer."""
    plain = tiny.build()
    exact = tiny.predict(plain)
    change(plain)
    unpatched = tiny.predict(plain)
    assert not torch.equal(unpatched, exact)
    expected = tiny.predict(tomesd.apply_patch(plain))
    model = tiny.patched(when, change)
    merged = tiny.predict(model)
    assert torch.equal(merged, expected)
    assert not torch.equal(merged, unpatched)
    assert torch.equal(tiny.predict(tomesd.remove_patch(model)), unpatched)


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
        tiny.predict(tiny.patched(when, lambda model: model.enable_cache(config)))


def test_a_cache_works_again_without_the_patch():
    tiny = TINY[FLUX]
    model: Any = tomesd.apply_patch(tiny.build())
    model.enable_cache(CACHES[0])
    tomesd.remove_patch(model)
    with model.cache_context("cond"):
        assert tiny.predict(model).isfinite().all()
