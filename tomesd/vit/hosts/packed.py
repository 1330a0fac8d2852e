"""Vision towers that pack the pictures of a call into one sequence: Pixtral, and those of Qwen-VL.

Each picture merges for itself, whatever its size. Queries and keys are rotated by positions.

The towers of Qwen-VL merge within their blocks, since their patch merger needs every cell of the
token grid. In Qwen2.5-VL, most blocks attend within windows of that grid: those do not merge.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.hooks import by_name, unless_removed
from tomesd.registry import register
from tomesd.vit.carriers import Carrier, plain_output
from tomesd.vit.forward import Forward
from tomesd.vit.hosts.placed import at_heads
from tomesd.vit.hosts.rotary import patches
from tomesd.vit.hosts.transformers import TAKE_A_BIAS, TRANSFORMERS, places
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.rotary import Rotary
from tomesd.vit.settings import ViTSettings
from tomesd.vit.spec import Places, ViT


def _check_attention(model: Any, settings: ViTSettings) -> None:
    attention = model.config._attn_implementation
    if attention not in TAKE_A_BIAS:
        raise ValueError(
            f"attn_implementation must be {' or '.join(TAKE_A_BIAS)} with {type(model).__name__}, "
            "where pictures that are packed into one sequence merge each for itself, got "
            f"{attention!r}: call set_attn_implementation first"
        )


class _PackedKeys(Carrier):
    """Queries, keys and values of all pictures, until they are split."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.split and result[0].bias is not None:
            lengths = [part.shape[2] for part in result]
            for part, bias in zip(result, result[0].bias.split(lengths, -1), strict=True):
                part.bias = bias
        return result


class _Packed(Layer):
    """Blocks of [N, C], which are told where each picture ends."""

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)
        patch.after(points.attention, plain_output)

    def lengths(self, given: Kwargs) -> Sequence[int]:
        each: Tensor = given["cu_seqlens"].diff()
        if torch.compiler.is_compiling():  # No graph has the sizes of pictures in it: all equal.
            tokens = next(iter(given.values())).shape[0]
            return [tokens // len(each)] * len(each)
        # The host reads them too, in every block.
        lengths: list[int] = each.tolist()
        return lengths

    def merge_within(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = by_name(self.block_names, args, kwargs)
        first, *others = given
        rest = {name: given[name] for name in others}
        args, kwargs = super().merge_within(block, (given[first],), rest)
        so_far = self.forward.maps[self.index]
        if so_far is None:
            return args, kwargs
        ends, forward = given["cu_seqlens"], self.forward
        left = forward.left(self.index, forward.lengths[0] or ())
        angles = (Rotary("", dims=2).merged(x, so_far) for x in given["position_embeddings"])
        return args, kwargs | {
            "cu_seqlens": ends.new_tensor([0, *accumulate(left)]),
            "position_embeddings": tuple(angles),
        }

    def carry_bias(self, qkv: nn.Module, args: Args, output: Tensor) -> Tensor | Carrier:
        if self.idle:
            return output
        bias = self.forward.key_bias(self.index, self.tokens(args[0]), None)
        return output if bias is None else _PackedKeys(output, bias[:, None, None])

    def tokens(self, x: Tensor) -> Tensor:
        return x[None]

    def like(self, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens[0]

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.num_heads * attention.head_dim)


def _counted(mask: Tensor) -> Sequence[int]:
    """The lengths of pictures that a mask [N, N] hides from each other, read from its values."""
    # A picture ends where a token does not see the next one.
    ends = (mask.diagonal(-1) < 0).nonzero().flatten().tolist()
    ends = [0, *(end + 1 for end in ends), len(mask)]
    return [end - start for start, end in pairwise(ends)]


class _Masked(Layer):
    """Blocks of [1, N, C], in which a mask hides pictures from each other."""

    def install(self, patch: Any, points: HookPoints) -> None:
        super().install(patch, points)
        if self.index == 0:
            patch.before(patch.model, self.count)

    @unless_removed
    def count(self, model: Any, args: Args, kwargs: Kwargs) -> None:
        """Count each picture's tokens as the host does, without a look at the mask's values."""
        given = by_name(("pixel_values", "image_sizes"), args[:2], kwargs)
        pictures, sizes = given["pixel_values"], given.get("image_sizes")
        if torch.compiler.is_compiling():
            if len(pictures) > 1:
                raise ValueError(
                    "pixel_values must be of one picture in a compiled graph, which cannot depend "
                    f"on where each of them ends, got {len(pictures)}"
                )
            return
        if sizes is None:
            sizes = [pictures.shape[-2:]] * len(pictures)
        elif isinstance(sizes, Tensor):
            sizes = sizes.tolist()
        patch = model.patch_size
        self.forwards.thread.lengths = [(h // patch) * (w // patch) for h, w in sizes]

    def lengths(self, given: Kwargs) -> Sequence[int]:
        mask: Tensor = given[self.mask]
        if torch.compiler.is_compiling():
            return [mask.shape[-1]]
        # Checkpointing passes the same mask again.
        known: Forward | None = self.forwards.of_inputs.get(mask)
        if known is not None and known.lengths[0] is not None:
            return known.lengths[0]
        self.forwards.of_inputs[mask] = self.forward
        counted, self.forwards.thread.lengths = self.forwards.thread.lengths, None
        return _counted(mask[0, 0]) if counted is None else counted

    def hiding(self, mask: Tensor | None) -> Tensor | None:
        return None

    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.idle:
            return args, kwargs
        given = by_name(self.names, args, kwargs)
        mask, forward = given[self.mask], self.forward
        lengths = forward.lengths[0]
        if lengths is None:
            lengths = forward.lengths[0] = self.lengths(given)
        args, given = super().weigh_keys(attention, (), given | {self.mask: None})
        if len(lengths) > 1:
            bias = given[self.mask]
            mask = at_heads(mask, forward.maps[self.index])
            given[self.mask] = mask if bias is None else mask + bias
        return args, given


register(
    replace(
        TRANSFORMERS,
        places={
            "PixtralAttentionLayer": places(
                "attention_norm", "attention", "ffn_norm", "feed_forward"
            )
        },
        prefix=lambda model: 0,
        tokens=patches,
        blocks=("transformer.layers",),
        rotary=Rotary("position_embeddings", dims=3),
        layer=_Masked,
        check=_check_attention,
    ),
    "transformers.PixtralVisionModel",
)


def _check(model: Any, settings: ViTSettings) -> None:
    if not settings.within_blocks:
        raise ValueError(
            f"within_blocks must be True with {type(model).__name__}, whose patch merger needs "
            "every cell of the token grid, got False"
        )
    _check_attention(model, settings)


_NAMES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")
_QKV = "attn.qkv"
# They have no size of their own: that of a picture of 448×448 px.
_QWEN = ViT(
    {
        f"{name}VisionBlock": Places("norm1", "attn", "norm2", "mlp", _QKV, _QKV, _QKV)
        for name in _NAMES
    },
    prefix=lambda model: 0,
    tokens=lambda model: (448 // model.config.patch_size) ** 2,
    blocks=("blocks",),
    layer=_Packed,
    check=_check,
)
register(
    _QWEN,
    "transformers.Qwen2VisionTransformerPretrainedModel",
    *(f"transformers.{name}VisionModel" for name in _NAMES[2:]),
)


def _global_blocks(model: Any) -> nn.ModuleList:
    return nn.ModuleList(model.blocks[index] for index in sorted(model.fullatt_block_indexes))


register(
    replace(_QWEN, blocks=_global_blocks), "transformers.Qwen2_5_VisionTransformerPretrainedModel"
)
