"""Token merging in timm's VisionTransformer; see `tomesd.vit.patch` for the hooks.

Class, distillation and register tokens are its prefix tokens. Fused attention stays on.
`forward_intermediates` (and `features_only`) hands out what each block gives, which is merged.
"""

from typing import Any

from torch import Tensor, nn

from tomesd.hooks import by_name
from tomesd.vit.patch import Layer, Seams, ViTPatch

MODELS = ("VisionTransformer",)
REFUSED = {
    "SwinTransformer": "its attention is in windows of the token grid, in every layer",
    "SwinTransformerV2": "its attention is in windows of the token grid, in every layer",
    "SwinTransformerV2Cr": "its attention is in windows of the token grid, in every layer",
    "Beit": "its attention adds a bias by token positions in every layer",
    "VisionTransformerRelPos": "its attention adds a bias by token positions in every layer",
    "Eva": "its attention rotates queries and keys by token positions in every layer",
}

# The arguments of Attention in order.
_ATTENTION_ARGUMENTS = ("x", "attn_mask", "is_causal")


class _Layer(Layer):
    def by_heads(self, name: str, output: Tensor) -> Tensor:
        if name != "v":
            return output.transpose(1, 2)
        batch, n, _ = output.shape
        return output.view(batch, n, 3, self.attention.num_heads, -1)[:, :, 2]

    def weigh_keys(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple:
        given = by_name(_ATTENTION_ARGUMENTS, args, kwargs)
        if given.get("is_causal"):
            raise ValueError("is_causal must be False where tokens merge, got True")
        bias = self.run.key_bias(self.index, given["x"], given.get("attn_mask"))
        return args[:1], kwargs | {"attn_mask": None if bias is None else bias[:, None, None]}


class TimmViTPatch(ViTPatch):
    layer_type = _Layer

    def find_seams(self) -> list[Seams]:
        return [_seams(index, block) for index, block in enumerate(self.model.blocks)]

    def count_prefix(self) -> int:
        return self.model.num_prefix_tokens

    def count_tokens(self) -> int:
        return self.model.patch_embed.num_patches + self.model.num_prefix_tokens


def _seams(index: int, block: Any) -> Seams:
    kind = type(block).__name__
    if kind not in ("Block", "ResPostBlock") or type(block.attn).__name__ != "Attention":
        raise TypeError(
            "model must have blocks of type Block or ResPostBlock with Attention, where tokens can "
            f"merge between attention and MLP, got {kind} with "
            f"{type(getattr(block, 'attn', None)).__name__} as block {index}"
        )
    attn = block.attn
    # ResPostBlock normalises what a branch gives instead of what it gets.
    enter, merge, unmerge = (
        (block.norm1, block.norm2, block.mlp) if kind == "Block" else (attn, block.mlp, block.norm2)
    )
    features = {"q": attn.q_norm, "k": attn.k_norm, "v": attn.qkv}
    return Seams(block, enter, attn, merge, unmerge, features, attn.num_heads * attn.head_dim)
