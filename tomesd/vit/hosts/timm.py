"""VisionTransformer of timm. Class, distillation and register tokens are its prefix tokens.

Fused attention stays on.
"""

from typing import Any

from torch import Tensor, nn

from tomesd.hooks import by_name
from tomesd.registry import refuse, register
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places, ViT


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


def _check_attention(model: Any, settings: Any) -> None:
    for index, block in enumerate(model.blocks):
        if type(getattr(block, "attn", None)).__name__ != "Attention":
            raise TypeError(
                "model must have blocks with Attention, whose keys can be weighed, got "
                f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__} as "
                f"block {index}"
            )


_FEATURES = {"q": "attn.q_norm", "k": "attn.k_norm", "v": "attn.qkv"}

register(
    ViT(
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
    ),
    "timm.VisionTransformer",
)

refuse(
    "its attention is in windows of the token grid, in every layer",
    "timm.SwinTransformer",
    "timm.SwinTransformerV2",
    "timm.SwinTransformerV2Cr",
)
refuse(
    "its attention adds a bias by token positions in every layer",
    "timm.Beit",
    "timm.VisionTransformerRelPos",
)
refuse("its attention rotates queries and keys by token positions in every layer", "timm.Eva")
