"""Vision Transformers of transformers whose attention rotates queries and keys by positions.

A merged token has the position of its head.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tomesd.core.token_map import TokenMap
from tomesd.registry import register
from tomesd.vit.carriers import Carrier
from tomesd.vit.hosts.biased_keys import SplitAttention
from tomesd.vit.hosts.transformers import (
    TRANSFORMERS,
    before_queries,
    check_attention,
    check_backbone,
    places,
    prefix,
)
from tomesd.vit.layer import Args, HookPoints, Kwargs
from tomesd.vit.rotary import Rotary
from tomesd.vit.spec import Places

_BLOCK = places("norm1", "attention", "norm2", "layer_scale2")


def patches(model: Any) -> int:
    """Of the model's own size."""
    sizes = (model.config.image_size, model.config.patch_size)
    image, patch = (x if isinstance(x, (tuple, list)) else (x, x) for x in sizes)
    return int(image[0] // patch[0] * (image[1] // patch[1]))


_DINOV3 = replace(
    TRANSFORMERS,
    places={"DINOv3ViTLayer": _BLOCK, "Sapiens2Layer": _BLOCK},
    tokens=lambda model: patches(model) + prefix(model),
    blocks=("model.layer",),
    rotary=Rotary("position_embeddings"),
    recorder=lambda model: model.model,
)
register(_DINOV3, "transformers.DINOv3ViTModel", "transformers.Sapiens2Model")
register(
    replace(
        _DINOV3,
        places={"EomtDinov3Layer": _BLOCK},
        blocks=before_queries,
        check=check_backbone,
        recorder=lambda model: model,
    ),
    "transformers.EomtDinov3ForUniversalSegmentation",
)
register(
    replace(_DINOV3, check=check_backbone),
    "transformers.DINOv3ViTBackbone",
    "transformers.Sapiens2Backbone",
)


class _PerSample:
    """A table of angles, [B, N, D], for an attention that adds the batch dimension itself."""

    def __init__(self, table: Tensor):
        self.table = table

    def unsqueeze(self, dim: int) -> Tensor:
        return self.table


class _MLCD(Rotary):
    def merged(self, angles: Any, so_far: TokenMap) -> Any:
        if so_far.m == so_far.n:
            return angles
        return tuple(_PerSample(super(_MLCD, self).merged(table, so_far)) for table in angles)


register(
    replace(
        TRANSFORMERS,
        places={"MLCDEncoderLayer": places("layer_norm1", "self_attn", "layer_norm2", "mlp")},
        tokens=lambda model: model.embeddings.num_patches + prefix(model),
        rotary=_MLCD("position_embeddings", dims=3),
    ),
    "transformers.MLCDVisionModel",
)


class _VJEPA2(SplitAttention):
    """Its attention is told which of the places of a video its tokens have.

    The bias of the keys is carried by the values where they meet in one function: keys are rotated
    before, which no graph can be compiled of while they carry something.
    """

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.attention, self.tell_positions)
        patch.after(points.features["k"], self.carry_on_keys)
        patch.after(points.features["v"], self.carry_on_values)

    def carry_on_keys(self, key: nn.Module, args: Args, output: Tensor) -> Tensor | Carrier:
        return output if self._is_fused() else self.carry_bias(key, args, output)

    def carry_on_values(self, value: nn.Module, args: Args, output: Tensor) -> Tensor | Carrier:
        return self.carry_bias(value, args, output) if self._is_fused() else output

    def _is_fused(self) -> bool:
        return bool(self.attention.config._attn_implementation == "sdpa")

    def tell_positions(self, attention: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        so_far = self.forward.maps[self.index]
        merged = so_far is not None and so_far.m < so_far.n
        return args, kwargs | {"position_mask": so_far.head if merged else None}


register(
    replace(
        TRANSFORMERS,
        places={
            "VJEPA2Layer": Places(
                "norm1",
                "attention",
                "norm2",
                "mlp",
                "attention.query",
                "attention.key",
                "attention.value",
            )
        },
        prefix=lambda model: 0,
        tokens=lambda model: model.encoder.embeddings.num_patches,
        layer=_VJEPA2,
        check=check_attention,
    ),
    "transformers.VJEPA2Model",
)
