"""Pipelines whose denoiser does not merge, and those that are not tried, with the reason.

A denoiser without its layers serves where its class alone is refused. Where it depends on what is
in it, it is built.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
from torch import nn

from tests.support.pipelines.build import Case, Family
from tests.support.pipelines.stand_ins import Autoencoder
from tests.support.tiny_model import WIDTH
from tests.support.tiny_unets import sd_unet
from tests.support.tiny_vits import build as build_vit


def blank(kind: type | str) -> nn.Module:
    """A model of the class with its default configuration and no layers."""
    kind = getattr(diffusers, kind) if isinstance(kind, str) else kind
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is not parameter.empty
    }
    # How every model of diffusers keeps its configuration.
    model._internal_dict = FrozenDict(defaults)
    return model


def of(
    denoiser: type | str,
    pipelines: Mapping[str, Case] | tuple[str, ...],
    parts: dict[str, Any] | None = None,
) -> Family:
    cases = pipelines if isinstance(pipelines, Mapping) else dict.fromkeys(pipelines, Case())
    return Family(lambda: blank(denoiser), cases, parts=parts or {})


def _attention_alone(**config: Any) -> nn.Module:
    """A UNet whose attention is not in transformers, as in DeepFloyd IF and Kandinsky 2."""
    return sd_unet(
        down_block_types=(
            "SimpleCrossAttnDownBlock2D",
            "SimpleCrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"),
        only_cross_attention=False,
        **config,
    )


def _dream_lite() -> nn.Module:
    return diffusers.DreamLiteUNetModel(
        sample_size=8, block_out_channels=(16, 32, 32), attention_head_dim=8, num_kv_heads=1,
        cross_attention_dim=WIDTH, norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip


def _prior(_: Family) -> nn.Module:
    return blank("PriorTransformer")


_CASCADE = {"decoder": lambda _: blank("StableCascadeUNet")}
_WUERSTCHEN = {"decoder": lambda _: blank(WuerstchenDiffNeXt)}
_WITHOUT_WATERMARK = Case({"watermarker": None})

REFUSED = (
    of(
        "SanaTransformer2DModel",
        {
            "SanaPipeline": Case(),
            "SanaPAGPipeline": Case({"pag_applied_layers": []}),
            "SanaControlNetPipeline": Case({"controlnet": lambda _: blank("SanaControlNetModel")}),
            "SanaSprintPipeline": Case(),
            "SanaSprintImg2ImgPipeline": Case(),
        },
    ),
    of("SanaVideoTransformer3DModel", ("SanaVideoPipeline", "SanaImageToVideoPipeline")),
    of("SanaWMTransformer3DModel", ("SanaWMPipeline",)),
    of("BriaFiboTransformer2DModel", ("BriaFiboPipeline", "BriaFiboEditPipeline")),
    of("AnyFlowFARTransformer3DModel", ("AnyFlowFARPipeline",)),
    of("HeliosTransformer3DModel", ("HeliosPipeline", "HeliosPyramidPipeline")),
    of(
        "HunyuanVideoFramepackTransformer3DModel",
        ("HunyuanVideoFramepackPipeline",),
        # It would merge if r were given.
        {"image_encoder": lambda _: build_vit("CLIP").model},
    ),
    of(
        "LTX2VideoTransformer3DModel",
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2HDRPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
        ),
    ),
    of("NucleusMoEImageTransformer2DModel", ("NucleusMoEImagePipeline",)),
    of("QwenImage21Transformer2DModel", ("QwenImage21Pipeline",)),
    of("Kandinsky3UNet", ("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline")),
    of("Kandinsky6SRTransformer3DModel", ("Kandinsky6SRPipeline",)),
    of(
        "Cosmos3OmniTransformer",
        {"Cosmos3OmniPipeline": Case({"enable_safety_checker": False})},
    ),
    of(
        "UVit2DModel",
        ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"),
        {"vqvae": lambda family: Autoencoder()},
    ),
    of(
        "Transformer2DModel",
        ("VQDiffusionPipeline",),
        {"vqvae": lambda family: Autoencoder()},
    ),
    of(
        "StableCascadeUNet",
        {
            "StableCascadeDecoderPipeline": Case(_CASCADE),
            "StableCascadePriorPipeline": Case({"prior": lambda _: blank("StableCascadeUNet")}),
            "StableCascadeCombinedPipeline": Case(
                _CASCADE | {"prior_prior": lambda _: blank("StableCascadeUNet")}
            ),
        },
    ),
    of(
        WuerstchenDiffNeXt,
        {
            "WuerstchenDecoderPipeline": Case(_WUERSTCHEN),
            "WuerstchenPriorPipeline": Case({"prior": lambda _: blank(WuerstchenPrior)}),
            "WuerstchenCombinedPipeline": Case(
                _WUERSTCHEN | {"prior_prior": lambda _: blank(WuerstchenPrior)}
            ),
        },
    ),
    of(
        "UNet2DModel",
        (
            "DDIMPipeline",
            "DDPMPipeline",
            "ConsistencyModelPipeline",
            "KarrasVePipeline",
            "LDMPipeline",
            "LDMSuperResolutionPipeline",
            "PNDMPipeline",
            "RePaintPipeline",
            "ScoreSdeVePipeline",
        ),
    ),
    Family(_dream_lite, {"DreamLitePipeline": Case(), "DreamLiteMobilePipeline": Case()}),
    Family(
        _attention_alone,
        {
            "IFPipeline": _WITHOUT_WATERMARK,
            "IFImg2ImgPipeline": _WITHOUT_WATERMARK,
            "IFInpaintingPipeline": _WITHOUT_WATERMARK,
            "IFSuperResolutionPipeline": Case({"watermarker": None}, {}, {"in_channels": 6}),
            "IFImg2ImgSuperResolutionPipeline": Case({"watermarker": None}, {}, {"in_channels": 6}),
            "IFInpaintingSuperResolutionPipeline": Case(
                {"watermarker": None}, {}, {"in_channels": 6}
            ),
            "KandinskyPipeline": Case(),
            "KandinskyImg2ImgPipeline": Case(),
            "KandinskyInpaintPipeline": Case(),
            "KandinskyV22Pipeline": Case(),
            "KandinskyV22Img2ImgPipeline": Case(),
            "KandinskyV22InpaintPipeline": Case(),
            "KandinskyV22ControlnetPipeline": Case(),
            "KandinskyV22ControlnetImg2ImgPipeline": Case(),
            "KandinskyCombinedPipeline": Case({"prior_prior": _prior}),
            "KandinskyImg2ImgCombinedPipeline": Case({"prior_prior": _prior}),
            "KandinskyInpaintCombinedPipeline": Case({"prior_prior": _prior}),
            "KandinskyV22CombinedPipeline": Case({"prior_prior": _prior}),
            "KandinskyV22Img2ImgCombinedPipeline": Case({"prior_prior": _prior}),
            "KandinskyV22InpaintCombinedPipeline": Case({"prior_prior": _prior}),
            "UnCLIPPipeline": Case(
                {"decoder": lambda _: _attention_alone(), "prior": _prior, "text_proj": None}
            ),
            "UnCLIPImageVariationPipeline": Case({"decoder": lambda _: _attention_alone()}),
        },
    ),
)

_NO_PICTURE = "makes neither images nor videos"
_NO_DENOISER = (
    "makes embeddings or larger latents for other pipelines, without a denoiser of images"
)
_ONNX = "runs exported models, which no hook can reach"
_PARTS = "needs parts that are not built here: "
NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(
        (
            "AceStepPipeline",
            "AudioLDM2Pipeline",
            "AudioLDMPipeline",
            "DanceDiffusionPipeline",
            "DiffusionGemmaPipeline",
            "LLaDA2Pipeline",
            "LongCatAudioDiTPipeline",
            "MusicLDMPipeline",
            "RFD4ProteinaPipeline",
            "ShapEImg2ImgPipeline",
            "ShapEPipeline",
            "StableAudio3AudioToAudioPipeline",
            "StableAudio3InpaintPipeline",
            "StableAudio3Pipeline",
            "StableAudioPipeline",
        ),
        _NO_PICTURE,
    ),
    **dict.fromkeys(
        (
            "FluxPriorReduxPipeline",
            "KandinskyPriorPipeline",
            "KandinskyV22PriorEmb2EmbPipeline",
            "KandinskyV22PriorPipeline",
            "LTX2LatentUpsamplePipeline",
            "LTX2VideoDiffusionDecodePipeline",
            "LTXLatentUpsamplePipeline",
        ),
        _NO_DENOISER,
    ),
    **dict.fromkeys(
        (
            "OnnxStableDiffusionImg2ImgPipeline",
            "OnnxStableDiffusionInpaintPipeline",
            "OnnxStableDiffusionPipeline",
            "OnnxStableDiffusionUpscalePipeline",
            "StableDiffusionOnnxPipeline",
        ),
        _ONNX,
    ),
    **dict.fromkeys(
        ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"),
        "its class can be had only where sentencepiece is installed",
    ),
    "EasyAnimateControlPipeline": "diffusers 0.42 calls its own encode_prompt with an argument "
    "that it does not take",
    "UniDiffuserPipeline": _PARTS + "UniDiffuserTextDecoder",
    "Cosmos2_5_TransferPipeline": _PARTS + "CosmosControlNetModel",
    **dict.fromkeys(
        (
            "VersatileDiffusionDualGuidedPipeline",
            "VersatileDiffusionImageVariationPipeline",
            "VersatileDiffusionPipeline",
            "VersatileDiffusionTextToImagePipeline",
        ),
        _PARTS + "UNetFlatConditionModel",
    ),
}
