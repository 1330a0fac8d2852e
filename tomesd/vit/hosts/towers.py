"""Vision towers of transformers: image encoders of vision-language models, CLIP and its variants.

Their projectors and language models get all tokens, unless unmerge=False.
"""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.hooks import by_name
from tomesd.registry import register
from tomesd.vit.hosts.transformers import TRANSFORMERS, places, prefix
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.spec import Places

_CLIP = places("layer_norm1", "self_attn", "layer_norm2", "mlp")
_TOWERS = replace(
    TRANSFORMERS,
    places={
        "CLIPEncoderLayer": _CLIP,
        "SiglipEncoderLayer": _CLIP,
        "Siglip2EncoderLayer": _CLIP,
        "MetaClip2EncoderLayer": _CLIP,
        "ChineseCLIPVisionLayer": _CLIP,
        "AltCLIPEncoderLayer": _CLIP,
        "CLIPSegEncoderLayer": _CLIP,
        "OwlViTEncoderLayer": _CLIP,
        "Owlv2EncoderLayer": _CLIP,
        "GitVisionEncoderLayer": _CLIP,
        "Kosmos2VisionEncoderLayer": _CLIP,
        "Idefics2EncoderLayer": _CLIP,
        "Idefics3EncoderLayer": _CLIP,
        "SmolVLMEncoderLayer": _CLIP,
        "JanusVisionEncoderLayer": _CLIP,
        "Aimv2EncoderLayer": places("rms_norm1", "attention", "rms_norm2", "ffn"),
    },
    tokens=lambda model: model.embeddings.num_patches + prefix(model),
)


class _InternVL(Layer):
    """Its keys are those after a norm, which has no width of its own."""

    @staticmethod
    def width(points: HookPoints) -> int:
        attention: Any = points.attention
        return int(attention.embed_dim)


register(
    _TOWERS,
    "transformers.CLIPVisionModel",
    "transformers.SiglipVisionModel",
    "transformers.Siglip2VisionModel",
    "transformers.MetaClip2VisionModel",
    "transformers.ChineseCLIPVisionModel",
    "transformers.AltCLIPVisionModel",
    "transformers.CLIPSegVisionModel",
    "transformers.OwlViTVisionTransformer",
    "transformers.Owlv2VisionTransformer",
    "transformers.Kosmos2VisionTransformer",
    "transformers.Idefics2VisionTransformer",
    "transformers.Idefics3VisionTransformer",
    "transformers.SmolVLMVisionTransformer",
    "transformers.JanusVisionModel",
)
register(
    replace(_TOWERS, tokens=lambda model: model.embeddings.position_ids.shape[1]),
    "transformers.Aimv2VisionModel",
)
# It collects the hidden states of its transformer.
register(
    replace(
        _TOWERS,
        blocks=("vision_model.encoder.layers",),
        prefix=lambda model: 1,
        tokens=lambda model: model.vision_model.embeddings.num_positions,
    ),
    "transformers.GitVisionModel",
)
register(
    replace(
        TRANSFORMERS,
        places={
            "InternVLVisionLayer": Places(
                "layernorm_before",
                "attention",
                "layernorm_after",
                "mlp",
                "attention.q_norm",
                "attention.k_norm",
                "attention.v_proj",
            )
        },
        layer=_InternVL,
    ),
    "transformers.InternVLVisionModel",
)


class _XCLIP(Layer):
    """A message from the other frames is the last token of its attention, and none of its own."""

    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.idle:
            return args, kwargs
        given = by_name(self.names, args, kwargs)
        x = given.pop(self.names[0])
        bias = self.forward.key_bias(self.index, x[:, :-1], given.get(self.mask))
        given[self.mask] = None if bias is None else F.pad(bias, (0, 1))[:, None, None]
        return (x,), given

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return super().by_heads(name, output)[:, :-1]


register(
    replace(_TOWERS, places={"XCLIPVisionEncoderLayer": _CLIP._replace(enter="")}, layer=_XCLIP),
    "transformers.XCLIPVisionModel",
)
