"""VisionTransformer of torchvision, and that of open_clip.

Its attention is PyTorch's MultiheadAttention, which projects queries, keys and values inside one
function. So they are computed again for the matching, from its input; averaged over heads that is
as little work as one head.
"""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tomesd.registry import refuse, register
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.settings import ViTSettings
from tomesd.vit.spec import Places, ViT


class _Layer(Layer):
    def weigh_keys(self, attention: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.idle:
            return args, kwargs
        x = args[0]
        for name in self.forward.matcher.needs:
            if name in ("q", "k", "v"):
                self.record(name, self._project(attention, name, x))
        bias = self.forward.key_bias(self.index, x, None)
        # MultiheadAttention cannot reshape the mask of an empty batch, which weighs nothing anyway.
        return args, kwargs | {self.mask: bias if x.shape[0] else None}

    def _project(self, attention: Any, name: str, x: Tensor) -> Tensor:
        """q, k or v as [B, N, H, D]; if only their mean over heads is read, as a single head."""
        part = "qkv".index(name)
        heads, width = attention.num_heads, attention.embed_dim
        weight = attention.in_proj_weight.detach().view(3, heads, -1, width)[part]
        bias = attention.in_proj_bias.detach().view(3, heads, -1)[part]
        if self.forward.matcher.averages_heads:
            weight, bias = weight.mean(0, keepdim=True), bias.mean(0, keepdim=True)
        projected = F.linear(x.detach(), weight.flatten(0, 1), bias.flatten())
        by_heads: Tensor = projected.unflatten(-1, (len(weight), -1))
        return by_heads

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.embed_dim)


def _check_batch_first(model: Any, settings: ViTSettings) -> None:
    if not model.transformer.batch_first:
        raise ValueError("batch_first must be True where tokens merge, got False")


_TORCHVISION = ViT(
    {"EncoderBlock": Places("ln_1", "self_attention", "ln_2", "mlp")},
    prefix=lambda model: 1,
    tokens=lambda model: model.seq_length,
    blocks=("encoder.layers",),
    attention_mask="key_padding_mask",
    layer=_Layer,
)
register(_TORCHVISION, "torchvision.VisionTransformer")
register(
    replace(
        _TORCHVISION,
        places={"ResidualAttentionBlock": Places("ln_1", "attn", "ln_2", "mlp")},
        tokens=lambda model: model.positional_embedding.shape[0],
        blocks=("transformer.resblocks",),
        check=_check_batch_first,
    ),
    "open_clip.VisionTransformer",
)
refuse(
    "its attention is in windows of the token grid, in every layer", "torchvision.SwinTransformer"
)
