"""Which attention processors and backends of diffusers add log(size) to the logits of the keys.

Checked against diffusers 0.42 (models/attention_processor.py and models/attention_dispatch.py) and
xformers 0.0.35 (ops/fmha/cutlass.py).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# In the names of backends that raise for a float mask. Those of NPUs do not: they read it as a
# boolean mask.
_MASKLESS = ("flash", "sage", "aiter", "npu", "xla")

# Processors that read a float mask as a boolean one.
_MISTAKEN = ("AttnProcessorNPU", "XLAFlashAttnProcessor2_0")


def check_takes_bias(attention: Any) -> None:
    """Raise ValueError if this attention would reject or, worse, ignore a bias on its keys.

    attention: an attention module of diffusers, with its current processor and backend.
    """
    processor = attention.processor
    name, backend = type(processor).__name__, _backend(processor)
    if name in _MISTAKEN:
        _refuse(name)
    if any(word in backend for word in _MASKLESS):
        _refuse(f"attention backend {backend!r}")
    attend = nn.functional.scaled_dot_product_attention
    if not torch.compiler.is_compiling() and _swallows_masks(attend):
        _refuse(f"{attend.__name__} in place of scaled_dot_product_attention")


def fit_bias(bias: Tensor, attention: Any, queries: int) -> Tensor:
    """The bias in the form that the processor takes; only xformers needs another form.

    bias: [B, 1, M], or [B, 1, 1, M]. queries: their number. Raises what check_takes_bias raises,
    since the processor may have been replaced since.

    xformers needs rows that are aligned to eight elements (`_check_bias_alignment`), so the bias
    must be a view into a larger tensor if M is not a multiple of 8. diffusers would copy a 3-D bias
    for each head and lose the alignment; it leaves one alone that already has all heads. Autocast
    does not cover xformers' kernel, which wants the dtype of the queries.
    """
    check_takes_bias(attention)
    processor = attention.processor
    if "XFormers" not in type(processor).__name__ and _backend(processor) != "xformers":
        return bias
    if torch.is_autocast_enabled(bias.device.type):
        bias = bias.to(torch.get_autocast_dtype(bias.device.type))
    if bias.dim() == 3:
        bias = bias.repeat_interleave(attention.heads, dim=0)
    keys = bias.shape[-1]
    bias = nn.functional.pad(bias, (0, -keys % 8))[..., :keys]
    # A view: XFormersAttnProcessor would expand it, that of Custom Diffusion would not.
    return bias.expand(-1, queries, -1) if bias.dim() == 3 else bias


def _backend(processor: Any) -> str:
    """The attention backend that a processor dispatches to; empty if it does not dispatch.

    A processor without a backend of its own uses the global one.
    """
    if not hasattr(processor, "_attention_backend"):
        return ""
    backend = processor._attention_backend
    if backend is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return str(getattr(backend, "value", backend))


def _swallows_masks(attend: Any) -> bool:
    """Whether it is SageAttention's, installed as its README says, and ignores attn_mask.

    sageattn does so in 1.0.6 and 2.2.0; one of its kernels, sageattn_qk_int8_pv_fp16_triton, has
    the argument in 2.2.0.
    """
    module = getattr(attend, "__module__", None) or ""
    return (
        module.partition(".")[0] == "sageattention"
        and "attn_mask" not in inspect.signature(attend).parameters
    )


def _refuse(what: str) -> None:
    raise ValueError(
        f"prop_attn must be False with {what}, which adds no attn_mask to the logits, got True: "
        "apply_patch(..., prop_attn=False), or choose another processor or backend"
    )
