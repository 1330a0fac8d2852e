"""Image and video encoders of transformers; `towers` and `sound` have those of their kind.

Heads, decoders, feature maps and `output_hidden_states` get all tokens, unless unmerge=False;
`output_attentions` returns the attention that was computed, which is between merged tokens.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from tomesd.registry import refuse, register
from tomesd.vit.layer import Args, Kwargs, Layer
from tomesd.vit.settings import ViTSettings
from tomesd.vit.spec import Places, ViT

# Flash attention takes no bias on its keys.
TAKE_A_BIAS = ("eager", "sdpa")

_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


def prefix(model: Any) -> int:
    """How many learned tokens lead the patches: parameters [C] or [1, tokens, C]."""
    found = [getattr(model.embeddings, name, None) for name in _PREFIX_TOKENS]
    return sum(1 if x.dim() == 1 else x.shape[1] for x in found if x is not None)


def _tokens(model: Any) -> int:
    embeddings = model.embeddings
    counted = embeddings if hasattr(embeddings, "num_patches") else embeddings.patch_embeddings
    # A masked autoencoder encodes visible patches only.
    visible = 1 - getattr(model.config, "mask_ratio", 0)
    return int(counted.num_patches * visible) + prefix(model)


def check_attention(model: Any, settings: ViTSettings) -> None:
    """Raise ValueError for an attention implementation that takes no bias on its keys."""
    attention = model.config._attn_implementation
    if settings.prop_attn and attention not in TAKE_A_BIAS:
        raise ValueError(
            f"prop_attn must be False with attn_implementation={attention!r}, which takes no bias "
            f"on its keys; or set_attn_implementation to {' or '.join(TAKE_A_BIAS)}"
        )


def check_backbone(model: Any, settings: ViTSettings) -> None:
    """Raise ValueError for settings that leave feature maps without a shape."""
    if not settings.unmerge:
        raise ValueError(
            f"unmerge must be True with {type(model).__name__}, whose feature maps need a value "
            "for every token, got False"
        )
    check_attention(model, settings)


def before_queries(model: Any) -> nn.ModuleList:
    """The blocks before those in which the queries of masks lead the patches."""
    layers: nn.ModuleList = model.layers
    return layers[: len(layers) - model.config.num_blocks]


def places(
    enter: str, attention: str, merge: str, unmerge: str, projection: str = "{}_proj"
) -> Places:
    """The places of a block, with the projections of queries, keys and values in its attention."""
    q, k, v = (f"{attention}.{projection.format(name)}" for name in "qkv")
    return Places(enter, attention, merge, unmerge, q, k, v)


_VIT = places("layernorm_before", "attention", "layernorm_after", "mlp")
_DINO = places("norm1", "attention", "norm2", "layer_scale2")

TRANSFORMERS = ViT(
    {
        "ViTLayer": _VIT,
        "DeiTLayer": _VIT,
        "ViTMAELayer": _VIT,
        "ViTMSNLayer": _VIT,
        "IJepaLayer": _VIT,
        "PixioLayer": _VIT,
        "VivitLayer": _VIT,
        "ASTLayer": _VIT,
    },
    prefix=prefix,
    tokens=_tokens,
    check=check_attention,
    recorder=lambda model: model,
)
# It collects hidden states in its encoder.
_DINOV2 = replace(
    TRANSFORMERS,
    places={
        "Dinov2Layer": _DINO,
        "Dinov2WithRegistersLayer": _DINO,
        "Tipsv2VisionLayer": _DINO,
    },
    recorder=lambda model: model.encoder,
)

register(
    TRANSFORMERS,
    "transformers.ViTModel",
    "transformers.DeiTModel",
    "transformers.ViTMAEModel",
    "transformers.ViTMSNModel",
    "transformers.IJepaModel",
    "transformers.PixioModel",
    "transformers.VivitModel",
)
register(
    replace(TRANSFORMERS, tokens=lambda model: model.embeddings.position_embeddings.shape[1]),
    "transformers.ASTModel",
)
register(
    _DINOV2,
    "transformers.Dinov2Model",
    "transformers.Dinov2WithRegistersModel",
    "transformers.Tipsv2VisionModel",
)
register(
    replace(
        _DINOV2,
        places={"EomtLayer": _DINO},
        blocks=before_queries,
        check=check_backbone,
        recorder=lambda model: model,
    ),
    "transformers.EomtForUniversalSegmentation",
)


class _Radio(Layer):
    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError("image_grid_hw must be None where tokens merge: one size of images")
        return super().weigh_keys(attention, args, kwargs)


def _radio_prefix(model: Any) -> int:
    return int(model.config.num_cls_tokens + model.config.num_registers)


register(
    replace(
        _DINOV2,
        places={"RadioLayer": _DINO},
        prefix=_radio_prefix,
        tokens=lambda model: (
            (model.config.image_size // model.config.patch_size) ** 2 + _radio_prefix(model)
        ),
        layer=_Radio,
    ),
    "transformers.RadioModel",
)
register(
    replace(_DINOV2, check=check_backbone),
    "transformers.Dinov2Backbone",
    "transformers.Dinov2WithRegistersBackbone",
    "transformers.Tipsv2VisionBackbone",
)

refuse(
    "its attention is in windows of the token grid, in every layer",
    "transformers.SwinModel",
    "transformers.SwinBackbone",
    "transformers.Swinv2Model",
    "transformers.Swinv2Backbone",
)
