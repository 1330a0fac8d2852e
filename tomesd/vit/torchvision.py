"""Token merging in torchvision's VisionTransformer; see `tomesd.vit.patch` for the hooks.

Its attention is PyTorch's MultiheadAttention, which projects queries, keys and values inside one
function. So they are computed once more for the matching, from what goes in; averaged over heads
that is as little as one head.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tomesd.vit.patch import Layer, Seams, ViTPatch

MODELS = ("VisionTransformer",)
REFUSED = {
    "SwinTransformer": "its attention is in windows of the token grid, in every layer",
}


class _Layer(Layer):
    def weigh_keys(self, attention: Any, args: tuple, kwargs: dict) -> tuple:
        x = args[0]
        for name in self.run.settings.needs:
            if name in ("q", "k", "v"):
                self.note(name, self._project(attention, name, x))
        bias = self.run.key_bias(self.index, x, None)
        return args, kwargs | {"key_padding_mask": bias}

    def _project(self, attention: Any, name: str, x: Tensor) -> Tensor:
        """q, k or v as [B, N, H, D]; with their mean over heads in place of all heads, if only
        that counts."""
        part = "qkv".index(name)
        heads, width = attention.num_heads, attention.embed_dim
        weight = attention.in_proj_weight.detach().view(3, heads, -1, width)[part]
        bias = attention.in_proj_bias.detach().view(3, heads, -1)[part]
        if self.run.settings.only_mean_counts:
            weight, bias = weight.mean(0, keepdim=True), bias.mean(0, keepdim=True)
        projected = F.linear(x.detach(), weight.flatten(0, 1), bias.flatten())
        return projected.unflatten(-1, (len(weight), -1))


class TorchvisionViTPatch(ViTPatch):
    layer_type = _Layer

    def find_seams(self) -> list[Seams]:
        return [
            Seams(
                block,
                block.ln_1,
                block.self_attention,
                block.ln_2,
                block.mlp,
                {},
                block.self_attention.embed_dim,
            )
            for block in self.model.encoder.layers
        ]

    def count_prefix(self) -> int:
        return 1

    def count_tokens(self) -> int:
        return self.model.seq_length
