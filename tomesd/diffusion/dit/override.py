"""Proportional attention in ComfyUI, whose attention functions let options replace them.

Each one asks the `transformer_options` that it is given for `optimized_attention_override`, and
calls that in its own place, with itself as the first argument. So log(size) gets onto the logits
without a mask in any signature of a model. Checked against ComfyUI a125cd8 and fe25114
(comfy/ldm/modules/attention.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OVERRIDE = "optimized_attention_override"

# They add a float mask with one row for all queries to the logits. Flash and SageAttention ignore
# masks, or hand over to a slower function.
_TAKE_MASKS = {
    *("attention_basic", "attention_pytorch", "attention_split", "attention_sub_quad"),
    "attention_xformers",
}


@dataclass(eq=False)
class Weighing:
    """An attention function's stand-in, which adds log(size) to the logits of its keys.

    bias: [B, 1, 1, keys], of image and text tokens. own: which of those are of image tokens, for
        attention among them alone. note: is told why nothing was added, or "".
    """

    bias: Tensor
    own: slice
    note: Callable[[str], None]

    def __call__(
        self,
        function: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Any = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        return function(
            q, k, v, heads, self._weighed(function.__name__, q, k, mask), *rest, **options
        )

    def _weighed(self, name: str, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
        bias = self.bias
        if k.shape[-2] != bias.shape[-1]:
            bias = bias[..., self.own]
        if name not in _TAKE_MASKS or k.shape[-2] != bias.shape[-1]:
            self.note(f"{name} takes no bias")
            return mask
        self.note("")
        bias = bias.to(q.dtype)
        if mask is None:
            return bias
        for dim in range(mask.dim(), 4):  # [queries, keys] or [B, queries, keys]
            mask = mask.unsqueeze(dim - 2)
        return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def overriding(options: dict[str, Any] | None, weighing: Weighing) -> dict[str, Any]:
    """Options that let attention be weighed, unless another extension has replaced it already."""
    options = options or {}
    if OVERRIDE in options:
        weighing.note("another extension replaces its attention function")
        return options
    weighing.note("its attention function asks for no replacement")
    return options | {OVERRIDE: weighing}
