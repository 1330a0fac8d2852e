"""Vision towers that pack pictures into one sequence without a batch dimension: Qwen2-VL, Qwen3-VL.

They merge within their blocks, since their patch merger needs every cell of the token grid. The
pictures of a call must have equally many tokens. Queries and keys are rotated by positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tomesd.hooks import by_name
from tomesd.registry import refuse, register
from tomesd.vit.carriers import Carrier, plain_output
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.rotary import Rotary
from tomesd.vit.settings import ViTSettings
from tomesd.vit.spec import Places, ViT


class _PackedKeys(Carrier):
    """Queries, keys and values of all pictures, until they are split."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.split and result[0].bias is not None:
            for part, bias in zip(result, result[0].bias.split(1), strict=True):
                part.bias = bias
        return result


class _Packed(Layer):
    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)
        patch.after(points.attention, plain_output)

    def merge_within(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = by_name(self.block_names, args, kwargs)
        ends = given["cu_seqlens"]
        lengths = ends.diff()
        # The host reads their lengths too, in every block.
        read = self.index == 0 and not torch.compiler.is_compiling()
        if read and (lengths != lengths[0]).any():
            raise ValueError(
                "grid_thw must have equally many tokens for each picture where tokens merge, got "
                f"{lengths.tolist()}; remove_patch first, or pass them one at a time"
            )
        self.forwards.thread.pictures = len(lengths)
        args, kwargs = super().merge_within(block, args[:1], given_without_first(given))
        so_far = self.forward.maps[self.index]
        if so_far is None:
            return args, kwargs
        tables = (self.tokens(table)[:, None] for table in given["position_embeddings"])
        angles = (Rotary("").merged(table, so_far) for table in tables)
        return args, kwargs | {
            "cu_seqlens": torch.arange(len(ends), device=ends.device, dtype=ends.dtype) * so_far.m,
            "position_embeddings": tuple(table.flatten(0, 2) for table in angles),
        }

    def carry_bias(self, qkv: nn.Module, args: Args, output: Tensor) -> Tensor | Carrier:
        if self.idle:
            return output
        bias = self.forward.key_bias(self.index, self.tokens(args[0]), None)
        return output if bias is None else _PackedKeys(output, bias[:, None, None])

    def tokens(self, x: Tensor) -> Tensor:
        tokens: Tensor = x.unflatten(0, (self.forwards.thread.pictures, -1))
        return tokens

    def like(self, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 1)

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.num_heads * attention.head_dim)


def given_without_first(given: dict[str, Any]) -> Kwargs:
    """The arguments of a block by name, without its tokens, which are passed by position."""
    _, *others = given
    return {name: given[name] for name in others}


def _check(model: Any, settings: ViTSettings) -> None:
    if not settings.within_blocks:
        raise ValueError(
            f"within_blocks must be True with {type(model).__name__}, whose patch merger needs "
            "every cell of the token grid, got False"
        )


_NAMES = ("Qwen2VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")
_QKV = "attn.qkv"
# They have no size of their own: that of a picture of 448×448 px.
register(
    ViT(
        {
            f"{name}VisionBlock": Places("norm1", "attn", "norm2", "mlp", _QKV, _QKV, _QKV)
            for name in _NAMES
        },
        prefix=lambda model: 0,
        tokens=lambda model: (448 // model.config.patch_size) ** 2,
        blocks=("blocks",),
        layer=_Packed,
        check=_check,
    ),
    "transformers.Qwen2VisionTransformerPretrainedModel",
    *(f"transformers.{name}VisionModel" for name in _NAMES[1:]),
)
refuse(
    "its attention is in windows of the token grid, in most layers",
    "transformers.Qwen2_5_VisionTransformerPretrainedModel",
)
