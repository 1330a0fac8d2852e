"""VisionTransformer and Eva of timm. Class, distillation and register tokens are its prefix tokens.

Fused attention stays on.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tomesd.hooks import by_name
from tomesd.registry import refuse, register
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.rotary import Rotary
from tomesd.vit.spec import Places, ViT, known_class


class _Layer(Layer):
    def by_heads(self, name: str, output: Tensor) -> Tensor:
        if name != "v":
            return output.transpose(1, 2)
        batch, n, _ = output.shape
        return output.view(batch, n, 3, self.attention.num_heads, -1)[:, :, 2]

    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if by_name(self.names, args, kwargs).get("is_causal"):
            raise ValueError("is_causal must be False where tokens merge, got True")
        return super().weigh_keys(attention, args, kwargs)

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.num_heads * attention.head_dim)


_ATTENTION = ("Attention", "AttentionRope", "EvaAttention")


def _check_attention(model: Any, settings: Any) -> None:
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if known_class(attention, _ATTENTION) is None:
            raise TypeError(
                f"model must have blocks with {' or '.join(_ATTENTION)}, whose keys can be "
                "weighted, or with a class that inherits their forward, got "
                f"{type(block).__name__} with {type(attention).__name__} as block {index}"
            )


_KEYS = {"q": "attn.q_norm", "k": "attn.k_norm"}
_FEATURES = {**_KEYS, "v": "attn.qkv"}

TIMM = ViT(
    {
        "Block": Places("norm1", "attn", "norm2", "mlp", **_FEATURES),
        # It normalizes the output of a branch instead of its input.
        "ResPostBlock": Places("attn", "attn", "mlp", "norm2", **_FEATURES),
    },
    prefix=lambda model: model.num_prefix_tokens,
    tokens=lambda model: model.patch_embed.num_patches + model.num_prefix_tokens,
    blocks=("blocks",),
    attention_mask="attn_mask",
    layer=_Layer,
    check=_check_attention,
)
register(TIMM, "timm.VisionTransformer")
# With rotary positions. Its attention may have no module that gives its values.
_EVA = replace(
    TIMM,
    places={
        "EvaBlock": Places("norm1", "attn", "norm2", "mlp", **_KEYS),
        "EvaBlockPostNorm": Places("attn", "attn", "mlp", "norm2", **_KEYS),
    },
    rotary=Rotary("rope"),
)
register(_EVA, "timm.Eva")


def _naflex_tokens(model: Any) -> int:
    height, width = model.embeds.pos_embed_grid_size or (16, 16)
    return int(height * width + model.num_prefix_tokens)


# Of any size and aspect; tokens that fill up a batch are masked.
register(
    replace(_EVA, places={**TIMM.places, **_EVA.places}, tokens=_naflex_tokens), "timm.NaFlexVit"
)

refuse(
    "its attention is in windows of the token grid, in every layer",
    "timm.SwinTransformer",
    "timm.SwinTransformerV2",
    "timm.SwinTransformerV2Cr",
)
