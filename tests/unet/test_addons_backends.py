"""Where attention is computed by something else than torch, log(size) arrives or is refused.

xformers' kernel is for GPUs alone. Here diffusers' own code for it runs, and in the kernel's place
is plain attention that refuses what xformers 0.0.35 and torch refuse.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_model import WIDTH
from tests.support.tiny_transformers import TINY
from tests.support.tiny_unets import predict, sd_unet, unet_inputs

FLUX, CHROMA, WAN = "FluxTransformer2DModel", "ChromaTransformer2DModel", "WanTransformer3DModel"
LTX, PIXART = "LTXVideoTransformer3DModel", "PixArtTransformer2DModel"
# Its 140 tokens merge to 70, which eight does not divide.
EVERYTHING = {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8}
SETTINGS = [{}, {"ratio": 0.3}, {"merge_queries": False}, EVERYTHING]


class _Kernel:
    """xformers.ops, as far as diffusers calls it, and the shapes of the biases that it got.

    What it refuses of a tensor as attn_bias: in xformers/ops/fmha, cutlass.py's
    `_check_bias_alignment` (memory; where each head has keys of its own, no other kernel takes a
    tensor) and common.py's `Inputs.validate_inputs` (shape, of four dimensions); in torch,
    attention.cu's `_efficient_attention_forward` (shape, once more, and precision).
    """

    def __init__(self):
        self.biases: list[tuple[int, ...]] = []

    def memory_efficient_attention(
        self, query, key, value, attn_bias=None, p=0.0, scale=None, op=None
    ) -> Tensor:
        assert query.dtype == key.dtype == value.dtype
        of_heads = query.dim() == 4
        q, k, v = (x.transpose(1, 2) if of_heads else x for x in (query, key, value))
        if attn_bias is not None:
            eighth = 128 // torch.finfo(attn_bias.dtype).bits
            assert not any(stride % eighth for stride in attn_bias.stride()[:-1])
            assert attn_bias.stride(-1) <= 1
            assert attn_bias.data_ptr() % 16 == 0
            assert attn_bias.shape == (*q.shape[:-1], k.shape[-2])
            assert attn_bias.dtype == query.dtype
            self.biases.append(tuple(attn_bias.shape))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = (q.float() @ k.float().transpose(-1, -2)) * scale
        weights = (logits if attn_bias is None else logits + attn_bias.float()).softmax(-1)
        out = (weights @ v.float()).to(query.dtype)
        return out.transpose(1, 2) if of_heads else out


@pytest.fixture
def kernel(monkeypatch) -> _Kernel:
    ours = _Kernel()
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ours))
    monkeypatch.setattr(attention_dispatch, "xops", ours)
    return ours


@pytest.fixture(autouse=True)
def _native_backend_afterwards():
    yield
    # Setting one is for the whole process.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def _xformers() -> list[Any]:
    return [
        attention_processor.XFormersAttnProcessor(),
        attention_processor.CustomDiffusionXFormersAttnProcessor(train_kv=False),
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("processor", _xformers(), ids=lambda each: type(each).__name__)
def test_a_unet_on_xformers_gives_the_same_output(kernel, processor, settings):
    expected = predict(tomesd.apply_patch(sd_unet(), **settings))
    unet = tomesd.apply_patch(sd_unet(), **settings)
    unet.set_attn_processor(processor)
    torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-5)
    assert any(shape[-1] % 8 for shape in kernel.biases)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_xformers_gets_a_bias_in_the_precision_of_the_queries(kernel, how, dtype):
    unet = tomesd.apply_patch(sd_unet(), **EVERYTHING)
    full = predict(unet)
    unet.set_attn_processor(attention_processor.XFormersAttnProcessor())
    if how == "autocast":
        for module in unet.modules():
            if isinstance(module, torch.nn.LayerNorm):
                # As autocast does it on CUDA.
                module.register_forward_hook(lambda _, args, y: y.float())
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        half = predict(unet.to(dtype) if how == "weights" else unet)
    assert (half.float() - full).abs().max() < 0.1
    assert any(shape[-1] % 8 for shape in kernel.biases)


@torch.no_grad()
def test_gligen_on_xformers_gives_the_same_output(kernel):
    unet = tomesd.apply_patch(sd_unet(attention_type="gated"))
    for module in unet.modules():
        if type(module).__name__ == "GatedSelfAttentionDense":
            # It starts shut.
            torch.nn.init.constant_(module.alpha_attn, 1.0)
    objects = {
        "boxes": torch.rand(2, 3, 4),
        "masks": torch.ones(2, 3),
        "positive_embeddings": torch.randn(2, 3, WIDTH),
    }
    given = unet_inputs(unet) | {"cross_attention_kwargs": {"gligen": objects}}
    expected = unet(**given).sample
    unet.set_attn_processor(attention_processor.XFormersAttnProcessor())
    torch.testing.assert_close(unet(**given).sample, expected, rtol=0, atol=1e-5)
    # Of the picture's tokens, and of those and three objects.
    assert {70, 73} == {shape[-1] for shape in kernel.biases}


@torch.no_grad()
def _on(backend: str, name: str) -> Tensor:
    """What a model gives on a backend, which is set as its own method would, if it were here."""
    model = TINY[name].build()
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = AttentionBackendName(backend)
    # xformers would not take LTX-Video's mask of five text tokens, unpatched either.
    given = {"encoder_attention_mask": None} if name == LTX else {}
    return TINY[name].call(tomesd.apply_patch(model), **given)


@pytest.mark.parametrize("name", [FLUX, CHROMA, WAN, LTX])
def test_a_transformer_on_xformers_gives_the_same_output(kernel, name):
    torch.testing.assert_close(_on("xformers", name), _on("native", name), rtol=0, atol=1e-5)
    assert any(shape[-1] % 8 for shape in kernel.biases)


def test_a_transformer_with_processors_of_xformers_gives_the_same_output(kernel):
    tiny = TINY[PIXART]
    model: Any = tomesd.apply_patch(tiny.build())
    with torch.no_grad():
        expected = tiny.call(model)
        model.set_attn_processor(attention_processor.XFormersAttnProcessor())
        torch.testing.assert_close(tiny.call(model), expected, rtol=0, atol=1e-5)
    assert any(shape[-1] % 8 for shape in kernel.biases)


def _adds_a_bias(backend: AttentionBackendName) -> bool:
    """Whether attention with a bias is what it must be, as far as that can be seen on the CPU."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 8, generator=draw) for n in (5, 7, 7))
    bias = torch.arange(1.0, 8).log().expand(2, 1, 1, 7)
    run: Any = _AttentionBackendRegistry._backends[backend]
    try:
        out = run(query, key, value, attn_mask=bias)
    except ValueError as error:
        if "mask" not in str(error):
            raise
        return False
    except (RuntimeError, TypeError):
        # It makes something of the mask, but has no kernel here. What NPUs make of it, see below.
        return backend.value != "_native_npu"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = (q @ k.transpose(-1, -2) / math.sqrt(8) + bias).softmax(-1) @ v
    torch.testing.assert_close(out.transpose(1, 2), expected)
    return True


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", _AttentionBackendRegistry.list_backends())
def test_exactly_the_backends_that_add_no_bias_are_refused(kernel, backend):
    if _adds_a_bias(backend):
        tomesd.apply_patch(_flux_on(backend))
        return
    with pytest.raises(ValueError, match=f"prop_attn must be False .*'{backend.value}'.* got True"):
        tomesd.apply_patch(_flux_on(backend))
    for settings in ({"prop_attn": False}, {"method": "prune"}, {"ratio": 0}):
        tomesd.apply_patch(_flux_on(backend), **settings)


def _flux_on(backend: AttentionBackendName) -> Any:
    model: Any = TINY[FLUX].build()
    for processor in model.attn_processors.values():
        processor._attention_backend = backend
    return model


def test_npus_turn_a_bias_into_a_boolean_mask():
    """So that its backend has to be refused, though it does not complain."""
    q = torch.zeros(2, 7, 3, 8)
    bias = torch.arange(1.0, 8).log().expand(2, 1, 1, 7)
    made = attention_dispatch._maybe_modify_attn_mask_npu(q, q, bias)
    assert made is not None
    assert made.dtype == torch.bool


@pytest.mark.parametrize("name", [FLUX, WAN])
@pytest.mark.parametrize("how", ["model", "context"])
def test_a_backend_without_masks_is_refused_whenever_it_is_set(name, how):
    tiny = TINY[name]
    model: Any = tiny.build()
    says = r"prop_attn must be False with attention backend '_native_flash'.*prop_attn=False"
    if how == "context":
        patched = tomesd.apply_patch(tiny.build())
        with attention_dispatch.attention_backend("_native_flash"):
            with pytest.raises(ValueError, match=says):
                tiny.call(patched)
            with pytest.raises(ValueError, match=says):
                tomesd.apply_patch(model)
        tiny.call(patched)
    else:
        model.set_attention_backend("_native_flash")
        with pytest.raises(ValueError, match=says):
            tomesd.apply_patch(model)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("kind", ["AttnProcessorNPU", "XLAFlashAttnProcessor2_0"])
def test_processors_that_would_mistake_a_bias_for_a_mask_are_refused(kind):
    # They can be made where their kernels are, only.
    processor = object.__new__(getattr(attention_processor, kind))
    unet = sd_unet()
    unet.set_attn_processor(processor)
    with pytest.raises(ValueError, match=f"prop_attn must be False with {kind}"):
        tomesd.apply_patch(unet)
    tomesd.apply_patch(unet, prop_attn=False)
    unet = tomesd.apply_patch(sd_unet())
    unet.set_attn_processor(processor)
    with pytest.raises(ValueError, match=f"prop_attn must be False with {kind}"):
        predict(unet)


def _sage(with_mask: bool) -> Any:
    """With the arguments of sageattn, or of sageattn_qk_int8_pv_fp16_triton of 2.2.0."""
    attend = F.scaled_dot_product_attention

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
        return attend(q, k, v, is_causal=is_causal, scale=sm_scale)

    def of_triton(q, k, v, tensor_layout="HND", is_causal=False, attn_mask=None, **kwargs):
        return attend(q, k, v, is_causal=is_causal, attn_mask=attn_mask)

    found = of_triton if with_mask else sageattn
    found.__module__ = "sageattention.core"
    return found


def test_sageattn_in_torchs_place_is_refused_where_it_would_swallow_the_bias(monkeypatch):
    unet = tomesd.apply_patch(sd_unet())
    expected = predict(unet)
    plain = predict(tomesd.apply_patch(sd_unet(), prop_attn=False))
    # As its README does it.
    monkeypatch.setattr(F, "scaled_dot_product_attention", _sage(with_mask=False))
    for refused in (lambda: predict(unet), lambda: tomesd.apply_patch(sd_unet())):
        with pytest.raises(ValueError, match="prop_attn must be False with sageattn"):
            refused()
    torch.testing.assert_close(predict(tomesd.apply_patch(sd_unet(), prop_attn=False)), plain)
    monkeypatch.undo()
    monkeypatch.setattr(F, "scaled_dot_product_attention", _sage(with_mask=True))
    torch.testing.assert_close(predict(unet), expected)
