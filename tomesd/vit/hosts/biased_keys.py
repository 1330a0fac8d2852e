"""Layers whose attention takes no mask, or whose MLP adds the residual stream itself.

VideoMAE, DPT, FLAVA, YOLOS and ViTPose of transformers, BLIP and its variants.

The keys carry log(size) to where the logits are computed.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tomesd.registry import register
from tomesd.vit.carriers import Carrier, plain_output
from tomesd.vit.hosts.transformers import TRANSFORMERS, check_backbone
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places


class BiasedKeys(Layer):
    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.after(points.features["k"], self.carry_bias)

    def carry_bias(self, key: nn.Module, args: Args, output: Tensor) -> Tensor | Carrier:
        bias = None if self.idle else self.forward.key_bias(self.index, args[0], None)
        return output if bias is None else Carrier(output, bias[:, None, None])


class SplitAttention(BiasedKeys):
    """The attention is a module inside another one, which has the output projection."""

    @staticmethod
    def whole_attention(points: HookPoints) -> nn.Module:
        return points.block.get_submodule("attention")

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return output.view(*output.shape[:-1], -1, self.attention.attention_head_size)


class _VideoMAE(SplitAttention):
    """The MLP ends in a module that adds the residual stream itself: the residual is merged, and
    nothing has to be unmerged."""

    def install_merging(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.merge, self.merge)
        patch.before(points.unmerge, self.merge_residual)
        patch.first_after(points.block, self.leave)

    def merge_residual(self, output: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden, residual = args
        return (hidden, self.forward.merge(self.index, residual)), kwargs

    def leave(self, block: nn.Module, args: Args, output: Any) -> Any:
        return self.finish(block, output)


class _Flava(_VideoMAE):
    """Its attention takes a mask."""

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.attention, self.weigh_keys)


class OneProjection(BiasedKeys):
    """One module projects queries, keys and values together, so values are carriers as well."""

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        super().install_attention(patch, points)
        patch.after(points.attention, plain_output)


class _Blip(OneProjection):
    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.embed_dim)

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        parts = output.view(
            *output.shape[:-1], 3, self.attention.num_heads, self.attention.head_dim
        )
        part: Tensor = parts[:, :, "qkv".index(name)]
        return part


_ATTENTION = "attention.attention"
_BLOCK = Places(
    "layernorm_before",
    _ATTENTION,
    "layernorm_after",
    "output",
    f"{_ATTENTION}.query",
    f"{_ATTENTION}.key",
    f"{_ATTENTION}.value",
)
_VIDEOMAE = replace(
    TRANSFORMERS, places={"VideoMAELayer": _BLOCK, "DPTViTLayer": _BLOCK}, layer=_VideoMAE
)
register(_VIDEOMAE, "transformers.VideoMAEModel")
register(
    replace(_VIDEOMAE, tokens=lambda model: model.embeddings.position_embeddings.shape[1]),
    "transformers.DPTModel",
)

register(
    replace(
        _VIDEOMAE,
        places={"FlavaLayer": _BLOCK},
        layer=_Flava,
        recorder=lambda model: model.encoder,
    ),
    "transformers.FlavaImageModel",
)
register(
    replace(
        _VIDEOMAE,
        places={"YolosLayer": _BLOCK},
        suffix=lambda model: model.config.num_detection_tokens,
        tokens=lambda model: model.embeddings.position_embeddings.shape[1],
        changes=lambda model: model.config.use_mid_position_embeddings,
    ),
    "transformers.YolosModel",
)
register(
    replace(
        _VIDEOMAE,
        places={"VitPoseBackboneLayer": _BLOCK._replace(unmerge="mlp")},
        prefix=lambda model: 0,
        tokens=lambda model: model.embeddings.patch_embeddings.num_patches,
        layer=SplitAttention,
        check=check_backbone,
        recorder=lambda model: model.encoder,
    ),
    "transformers.VitPoseBackbone",
)

_QKV = "self_attn.qkv"
_BLIP = Places("layer_norm1", "self_attn", "layer_norm2", "mlp", _QKV, _QKV, _QKV)
register(
    replace(
        TRANSFORMERS,
        places={
            "BlipEncoderLayer": _BLIP,
            "Blip2EncoderLayer": _BLIP,
            "InstructBlipEncoderLayer": _BLIP,
            "InstructBlipVideoEncoderLayer": _BLIP,
        },
        tokens=lambda model: model.embeddings.num_positions,
        layer=_Blip,
    ),
    "transformers.BlipVisionModel",
    "transformers.Blip2VisionModel",
    "transformers.InstructBlipVisionModel",
    "transformers.InstructBlipVideoVisionModel",
)
