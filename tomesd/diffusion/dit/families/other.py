"""Transformers of diffusers that do not merge, and why; those that resemble others are with them.

Most only lack a record: see docs/adding-a-model.md.
"""

from tomesd.diffusion.dit.record import Family

FAMILIES: tuple[Family, ...] = ()

_NOT_YET = "its blocks are not described yet; docs/adding-a-model.md shows how that is done"
_SOUND = "its tokens are moments of sound, not of a grid"
_PART = "it is a part of other models, of which those merge that tomesd.supported() lists"

REFUSED = {
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "PriorTransformer": "its tokens are of a text and of one embedding, not of a grid",
    "RFD4ProteinaTransformer": "its tokens are of a protein, not of a grid",
    "AnyFlowFARTransformer3DModel": (
        "its frames see earlier frames alone, by masks of all tokens, which merged ones are not"
    ),
    "QwenImage21Transformer2DModel": (
        "its pictures see earlier ones alone, by masks of all tokens, which merged ones are not"
    ),
    "HeliosTransformer3DModel": (
        "the tokens of its history are of several resolutions, not of one grid"
    ),
    "NucleusMoEImageTransformer2DModel": (
        "its experts choose among all tokens, and would choose others among merged ones"
    ),
    "DreamLiteTransformer2DModel": _PART,
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
} | dict.fromkeys(
    (
        "AnyFlowTransformer3DModel",
        "BriaFibo2Transformer2DModel",
        "Cosmos3OmniTransformer",
        "CosmosControlNetModel",
        "CosmosTransformer3DModel",
        "EasyAnimateTransformer3DModel",
        "ErnieImageTransformer2DModel",
        "Flux3Transformer2DModel",
        "GlmImageTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "Ideogram4Transformer2DModel",
        "JoyImageEditPlusTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6SRTransformer3DModel",
        "Kandinsky6Transformer3DModel",
        "Krea2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxH3Transformer3DModel",
        "MotifVideoTransformer3DModel",
        "OmniGenTransformer2DModel",
        "PRXTransformer2DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
        "WanAnimate2Transformer3DModel",
        "WanAnimateTransformer3DModel",
        "ZImageControlNetModel",
    ),
    _NOT_YET,
)
