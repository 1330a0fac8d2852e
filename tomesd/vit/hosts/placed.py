"""Attention with a relative position bias: BEiT and its variants, and timm's relpos models.

A merged token has the place of its head.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tomesd.core.token_map import TokenMap
from tomesd.hooks import argument_names, by_name, unless_removed
from tomesd.registry import register
from tomesd.vit.carriers import Carrier, plain_output
from tomesd.vit.hosts.timm import TIMM
from tomesd.vit.hosts.transformers import TRANSFORMERS, places
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places


def at_heads(bias: Tensor, so_far: TokenMap) -> Tensor:
    """A bias by places, [1, heads, N, N], of the merged tokens: [B, heads, M, M]."""
    if so_far.m == so_far.n:
        return bias
    head = so_far.head
    return bias[0][:, head[:, :, None], head[:, None, :]].transpose(0, 1)


class _Argument(Layer):
    """The bias of all places is an argument of the attention, in the place of a mask."""

    def install(self, patch: Any, points: HookPoints) -> None:
        super().install(patch, points)
        config = patch.model.config
        if self.index == 0 and (
            config.use_relative_position_bias or config.use_shared_relative_position_bias
        ):
            self.model_names = argument_names(patch.model)
            patch.before(patch.model, self.refuse_mask)

    @unless_removed
    def refuse_mask(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        mask = by_name(self.model_names, args, kwargs).get("attention_mask")
        if mask is not None:  # The host adds it to the bias, and only its values tell them apart.
            raise ValueError(
                "attention_mask must be None where attention has a relative position bias and "
                f"tokens merge, got one of shape {tuple(mask.shape)}; remove_patch first"
            )

    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = by_name(self.names, args, kwargs)
        bias = given.get(self.mask)
        if self.idle or bias is None or self.hiding(bias) is not None:
            return super().weigh_keys(attention, args, kwargs)
        x = given.pop(self.names[0])
        size = self.forward.key_bias(self.index, x, None)
        bias = at_heads(bias, self.forward.maps[self.index])
        given[self.mask] = bias if size is None else bias + size[:, None, None]
        return (x,), given

    def hiding(self, mask: Tensor | None) -> Tensor | None:
        return mask if mask is not None and mask.shape[1] == 1 else None


class _Module(_Argument):
    """A module of the attention gives the bias of all places."""

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        super().install_attention(patch, points)
        bias = getattr(points.attention, "relative_position_bias", None)
        if bias is not None:
            patch.after(bias, self.place)

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return output.view(*output.shape[:-1], -1, self.attention.attention_head_size)

    def place(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        return output if self.idle else at_heads(output, self.forward.maps[self.index])


_BEIT = replace(
    TRANSFORMERS,
    places={"BeitLayer": places("layernorm_before", "attention", "layernorm_after", "mlp")},
    layer=_Argument,
)
register(_BEIT, "transformers.BeitModel")
_ATTENTION = "attention.attention"
register(
    replace(
        _BEIT,
        places={
            "Data2VecVisionLayer": Places(
                "layernorm_before",
                _ATTENTION,
                "layernorm_after",
                "output",
                f"{_ATTENTION}.query",
                f"{_ATTENTION}.key",
                f"{_ATTENTION}.value",
            )
        },
        attention_mask="relative_position_bias",
        layer=_Module,
        recorder=lambda model: model.encoder,
    ),
    "transformers.Data2VecVisionModel",
)


class Placed(Carrier):
    """What the attention computes from its input: queries, keys and values in the end."""

    def __init__(self, tensor: Tensor, bias: Tensor | None, layer: "PlacedInput"):
        super().__init__(tensor, bias)
        self.layer, self.so_far = layer, layer.forward.maps[layer.index]

    def unbind(self, dim: int) -> Any:
        parts = self.carry(self.tensor.unbind(dim))
        for name, part in zip("qkv", parts, strict=True):
            if name in self.layer.forward.matcher.needs and name not in self.layer.hooked:
                self.layer.record(name, part.tensor.transpose(1, 2))
        return parts

    def __add__(self, other: Any) -> Any:
        if other.dim() > 1 and other.shape[-2:] == (self.so_far.n, self.so_far.n):
            other = at_heads(other, self.so_far)
        return self.carry(self.tensor + other)

    def total(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return self.bias
        mask = at_heads(mask, self.so_far)
        return mask if self.bias is None else mask + self.bias


class PlacedInput(Layer):
    """A method of the attention gives the bias of all places, so that no module can be hooked:
    what the attention computes from its input carries the places and sizes to its logits."""

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        self.hooked = tuple(points.features)
        patch.before(points.attention, self.carry)
        patch.after(points.attention, plain_output)

    carrier: type[Placed] = Placed

    def carry(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.idle:
            return args, kwargs
        given = by_name(self.names, args, kwargs)
        x = given.pop(self.names[0])
        bias = self.forward.key_bias(self.index, self.attended(x), None)
        placed = self.carrier(x, None if bias is None else bias[:, None, None], self)
        return (placed,), given

    def by_heads(self, name: str, output: Any) -> Tensor:
        by_heads: Tensor = output.tensor.transpose(1, 2)
        return by_heads

    def attended(self, x: Tensor) -> Tensor:
        """The input of the attention as [B, N, C]."""
        return x

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.qkv.out_features // 3)


_NORMS = {"q": "attn.q_norm", "k": "attn.k_norm"}
_TIMM = replace(
    TIMM,
    places={
        "Block": Places("norm1", "attn", "norm2", "mlp"),
        "RelPosBlock": Places("norm1", "attn", "norm2", "mlp", **_NORMS),
        "ResPostRelPosBlock": Places("attn", "attn", "mlp", "norm2", **_NORMS),
    },
    layer=PlacedInput,
    check=None,
)
register(_TIMM, "timm.Beit", "timm.VisionTransformerRelPos")
