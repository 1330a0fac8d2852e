"""How diffusers' attention takes log(size) on its keys, or that it takes none.

What is said here of processors and backends is so in diffusers 0.42, models/attention_processor.py
and models/attention_dispatch.py; what xformers wants, in its 0.0.35, ops/fmha/cutlass.py.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# In the names of backends that raise for a mask of numbers. Those of NPUs do not, but take it for
# one of booleans.
_MASKLESS = ("flash", "sage", "aiter", "npu", "xla")

# Processors that take a mask of numbers for one of booleans.
_MISTAKEN = ("AttnProcessorNPU", "XLAFlashAttnProcessor2_0")


def check_takes_bias(attention: Any) -> None:
    """Raise ValueError where proportional attention would be refused or, worse, be left out.

    attention: a module of diffusers with a processor; its backend is the one set now.
    """
    processor = attention.processor
    name, backend = type(processor).__name__, _backend(processor)
    if name in _MISTAKEN:
        _refuse(name)
    if any(word in backend for word in _MASKLESS):
        _refuse(f"attention backend {backend!r}")
    attend = nn.functional.scaled_dot_product_attention
    if not torch.compiler.is_compiling() and _swallows_masks(attend):
        _refuse(f"{attend.__name__} in the place of scaled_dot_product_attention")


def fit_bias(bias: Tensor, attention: Any, queries: int) -> Tensor:
    """The bias of keys as the processor takes it: another one for xformers alone.

    bias: [B, 1, M], or [B, 1, 1, M]. queries: their number. Raises what check_takes_bias raises,
    since the processor may be another one by now.

    xformers adds a tensor to the logits only if its rows begin at every eighth number of its memory
    (`_check_bias_alignment`), so that it must be a part of a larger one where M is not a multiple
    of 8. Of three dimensions, diffusers would copy it for each head, and not keep it so; one that
    is there for all heads is left alone. Autocast does not know xformers' kernel, which wants
    the precision of the queries.
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
    # A view, which XFormersAttnProcessor would make by itself, but not that of Custom Diffusion.
    return bias.expand(-1, queries, -1) if bias.dim() == 3 else bias


def _backend(processor: Any) -> str:
    """What computes the attention of a processor; empty where it does not leave that to diffusers.

    One that was set for all models counts where none was set for its own.
    """
    if not hasattr(processor, "_attention_backend"):
        return ""
    backend = processor._attention_backend
    if backend is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return getattr(backend, "value", backend)


def _swallows_masks(attend: Any) -> bool:
    """Whether it is of SageAttention, put there as its README says, and ignores attn_mask.

    sageattn does, in 1.0.6 and in the sources of 2.2.0; one of the kernels that it chooses from,
    sageattn_qk_int8_pv_fp16_triton, has that argument in the latter.
    """
    module = getattr(attend, "__module__", None) or ""
    return (
        module.partition(".")[0] == "sageattention"
        and "attn_mask" not in inspect.signature(attend).parameters
    )


def _refuse(what: str) -> None:
    raise ValueError(
        f"prop_attn must be False with {what}, which adds no attn_mask to the logits, got True: "
        "apply_patch(..., prop_attn=False), or compute attention in another way"
    )
