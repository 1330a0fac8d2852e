"""How log(size) gets onto the logits of the keys in the attention of ldm, sgm and what copied them.

Checked against the `ldm` of stable-diffusion-sdkit 2.1.5, Stability-AI/generative-models 0ad7de9,
ComfyUI a125cd8, Stable Diffusion WebUI Forge dfdcbab and Fooocus 59f183a.
"""

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.hooks import argument_names


class Way(Enum):
    """MASK: the attention adds a float mask to the logits. FEATURE: it scales by a number of its
    own, so one more feature does the same exactly: 1 on the queries, log(size)/scale on the keys.
    UNMERGE: keys and values are unmerged before any kernel sees them; exact, at half the saving.
    """

    MASK = "mask"
    FEATURE = "feature"
    UNMERGE = "unmerge"


# The names under which ComfyUI's attention and its copies call their kernel, and the kernel that
# takes a mask with one row for all queries in each of them. Slicing, xformers, flash and
# SageAttention do not, or only with as much memory as merging is to save.
_KERNELS = ("optimized_attention_masked", "attention_function")
_TAKES_MASK = "attention_pytorch"


def way_of(attention: Any) -> Way:
    """The way for one attention module, as it is now: the WebUIs replace its forward.

    attention: `attn1` or `attn2` of a BasicTransformerBlock.
    """
    kind = type(attention)
    forward = kind.forward
    if "forward" in vars(attention) or forward.__module__ != kind.__module__:
        return Way.UNMERGE
    for name in _KERNELS:
        if name in forward.__globals__:
            kernel = forward.__globals__[name]
            return Way.MASK if kernel.__name__ == _TAKES_MASK else Way.UNMERGE
    if kind.__name__ != "CrossAttention" or not hasattr(attention, "scale"):
        return Way.UNMERGE  # xformers, which raises for masks
    # ldm computes the softmax itself and takes boolean masks only; sgm calls PyTorch's attention.
    return Way.MASK if "additional_tokens" in argument_names(attention) else Way.FEATURE


def add_feature(projected: Tensor, heads: int, value: Tensor | float) -> Tensor:
    """Queries or keys [B, N, heads·d] with one more feature in each head: [B, N, heads·(d + 1)].

    value: of all tokens, or of each: [B, N, 1].

    >>> add_feature(torch.zeros(1, 1, 4), 2, 5.0)
    tensor([[[0., 0., 5., 0., 0., 5.]]])
    """
    by_head = projected.unflatten(2, (heads, -1))
    if not isinstance(value, Tensor):
        return nn.functional.pad(by_head, (0, 1), value=value).flatten(2)
    one = value.to(projected.dtype)[:, :, None].expand(-1, -1, heads, -1)
    return torch.cat([by_head, one], dim=3).flatten(2)
