"""Pipelines of transformers for images; sizes are tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch

from tests.support import tiny_transformers
from tests.support.pipelines.build import PICTURE, Case, Draw, Family
from tests.support.pipelines.stand_ins import ImageEncoder, Processor, TextEncoder
from tests.support.tiny_model import WIDTH


def tiny(name: str) -> Callable[..., Any]:
    models = tiny_transformers.TINY | tiny_transformers.CONTROLNETS
    models |= {"DiTTransformer2DModel": tiny_transformers.DIT}
    return lambda **config: models[name].build(**config)


def of(
    name: str,
    pipelines: Mapping[str, Case] | tuple[str, ...],
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Family:
    """The pipelines of a transformer; config: of the transformer in all of them."""
    cases = pipelines if isinstance(pipelines, Mapping) else dict.fromkeys(pipelines, Case())
    return Family(lambda **own: tiny(name)(**{**(config or {}), **own}), cases, **more)


def _controlnet(name: str, **config: Any) -> dict[str, Any]:
    return {"controlnet": lambda _: tiny(name)(**config)}


_FILL = {"in_channels": 4 + 4 + 256, "out_channels": 4}
_CONTROL = {"in_channels": 8, "out_channels": 4}
_CLOZE = {
    "task_prompt": "a task",
    "content_prompt": "a cat",
    "image": [[PICTURE, PICTURE], [PICTURE, None]],
}
_PAG = {"pag_applied_layers": ["blocks.0"]}
_FLUX_NET = _controlnet("FluxControlNetModel")
_SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 2 * WIDTH,
    "pooled_projection_dim": 2 * WIDTH,
}
_SD3_NET = _controlnet("SD3ControlNetModel", **_SD3)
_HUNYUAN_TEXT = {"text_len": 77, "text_len_t5": 256, "learn_sigma": True}
_HUNYUAN_NET = {"text_len": 77, "text_len_t5": 256}
_LONGCAT = {"in_channels": 64}
# What they are given is scaled to a megapixel: few latents, all the same.
_MEGAPIXEL = {"space": 128, "cell": 256}
_QWEN_NET = _controlnet("QwenImageControlNetModel")


def _small(pipe, h, w) -> None:
    """Pictures are scaled to the area of so many latents."""
    pipe.default_sample_size = 12


def _without_layers(pipe, h, w) -> None:
    """It calls the layers of its text encoder one by one."""
    pipe._get_text_encoder_hidden_states = lambda encoder, ids, *_: [encoder(ids)[0]]


def _unguided(family: Family):
    """It reads a field that published models have."""
    model = family.denoiser()
    model.register_to_config(guidance_embeds=False)
    return model


def _z_image_net(channels: int):
    """What it does not have itself it takes from its transformer."""
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=24,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )


IMAGES = (
    of(
        "FluxTransformer2DModel",
        {
            "FluxPipeline": Case(),
            "FluxImg2ImgPipeline": Case(),
            "FluxInpaintPipeline": Case(),
            "FluxFillPipeline": Case(config=_FILL),
            "FluxControlPipeline": Case(config=_CONTROL),
            "FluxControlImg2ImgPipeline": Case(config=_CONTROL),
            "FluxControlInpaintPipeline": Case(config=_CONTROL),
            "FluxControlNetPipeline": Case(_FLUX_NET),
            "FluxControlNetImg2ImgPipeline": Case(_FLUX_NET),
            "FluxControlNetInpaintPipeline": Case(_FLUX_NET),
            "FluxKontextPipeline": Case(call={"_auto_resize": False}),
            "FluxKontextInpaintPipeline": Case(call={"_auto_resize": False}),
            "VisualClozeGenerationPipeline": Case({"resolution": 96}, _CLOZE, _FILL),
            "VisualClozePipeline": Case(
                {"resolution": 96},
                _CLOZE | {"upsampling_height": Draw.HEIGHT, "upsampling_width": Draw.WIDTH},
                _FILL,
            ),
        },
        channels=1,
    ),
    of(
        "Flux2Transformer2DModel",
        (
            "Flux2Pipeline",
            "Flux2KleinPipeline",
            "Flux2KleinInpaintPipeline",
            "Flux2KleinKVPipeline",
        ),
        {"joint_attention_dim": 3 * WIDTH},
        channels=1,
    ),
    of(
        "ChromaTransformer2DModel",
        {
            "ChromaPipeline": Case(),
            "ChromaImg2ImgPipeline": Case(),
            "ChromaInpaintPipeline": Case({"transformer": lambda family: _unguided(family)}),
        },
        channels=1,
    ),
    of("BriaTransformer2DModel", ("BriaPipeline",), channels=1),
    of("BriaFibo2Transformer2DModel", ("BriaFibo2Pipeline",), {"cap_feat_dim": 3 * WIDTH}),
    of("LongCatImageTransformer2DModel", ("LongCatImagePipeline",), _LONGCAT, channels=16),
    of(
        "LongCatImageTransformer2DModel",
        ("LongCatImageEditPipeline",),
        _LONGCAT,
        channels=16,
        **_MEGAPIXEL,
    ),
    of("OvisImageTransformer2DModel", ("OvisImagePipeline",), channels=1),
    of(
        "SD3Transformer2DModel",
        {
            "StableDiffusion3Pipeline": Case(),
            "StableDiffusion3Img2ImgPipeline": Case(),
            "StableDiffusion3InpaintPipeline": Case(),
            "StableDiffusion3ControlNetPipeline": Case(_SD3_NET),
            "StableDiffusion3ControlNetInpaintingPipeline": Case(
                _controlnet("SD3ControlNetModel", **_SD3, extra_conditioning_channels=1)
            ),
            "StableDiffusion3PAGPipeline": Case(_PAG, config={"dual_attention_layers": ()}),
            "StableDiffusion3PAGImg2ImgPipeline": Case(_PAG, config={"dual_attention_layers": ()}),
        },
        _SD3,
        channels=16,
        # Two texts side by side, and one as wide as both.
        parts={"text_encoder_3": lambda _: TextEncoder(2 * WIDTH)},
    ),
    of("AuraFlowTransformer2DModel", ("AuraFlowPipeline",)),
    of(
        "QwenImageTransformer2DModel",
        {
            "QwenImagePipeline": Case(),
            "QwenImageImg2ImgPipeline": Case(),
            "QwenImageInpaintPipeline": Case(),
            "QwenImageControlNetPipeline": Case(_QWEN_NET),
            "QwenImageControlNetInpaintPipeline": Case(
                _controlnet("QwenImageControlNetModel", extra_condition_channels=4)
            ),
        },
        time=4,
    ),
    of(
        "QwenImageTransformer2DModel",
        {
            "QwenImageEditPipeline": Case(),
            "QwenImageEditInpaintPipeline": Case(),
            "QwenImageEditPlusPipeline": Case(),
            "QwenImageLayeredPipeline": Case(call={"output_type": "pt"}),
        },
        time=4,
        **_MEGAPIXEL,
    ),
    of(
        "PixArtTransformer2DModel",
        {
            "PixArtAlphaPipeline": Case(),
            "PixArtSigmaPipeline": Case(),
            "PixArtSigmaPAGPipeline": Case(_PAG),
        },
        scheduler=diffusers.DPMSolverMultistepScheduler,
        call={"use_resolution_binning": False},
    ),
    of(
        "DiTTransformer2DModel",
        {"DiTPipeline": Case(call={"class_labels": [1]})},
        scheduler=diffusers.DDIMScheduler,
        sizes=((8, 8),),
    ),
    of(
        "HunyuanDiT2DModel",
        {
            "HunyuanDiTPipeline": Case(),
            "HunyuanDiTPAGPipeline": Case(_PAG),
            "HunyuanDiTControlNetPipeline": Case(
                _controlnet("HunyuanDiT2DControlNetModel", **_HUNYUAN_NET)
            ),
        },
        _HUNYUAN_TEXT,
        scheduler=diffusers.DDPMScheduler,
        call={"use_resolution_binning": False},
    ),
    of(
        "CogView3PlusTransformer2DModel",
        ("CogView3PlusPipeline",),
        scheduler=diffusers.CogVideoXDDIMScheduler,
    ),
    of(
        "CogView4Transformer2DModel",
        {"CogView4Pipeline": Case(), "CogView4ControlPipeline": Case(config=_CONTROL)},
    ),
    of(
        "GlmImageTransformer2DModel",
        {
            "GlmImagePipeline": Case(
                call={
                    "image": None,
                    "prior_token_ids": lambda h, w: torch.arange(h * w // 256)[None] % 8,
                }
            )
        },
        sizes=((6, 6), (6, 10)),
    ),
    of(
        "HunyuanImageTransformer2DModel",
        {
            "HunyuanImagePipeline": Case(config={"text_embed_2_dim": WIDTH}),
            "HunyuanImageRefinerPipeline": Case(
                # Two frames of latents side by side.
                config={
                    "in_channels": 16,
                    "out_channels": 8,
                    "patch_size": (1, 2, 2),
                    "rope_axes_dim": (2, 2, 4),
                }
            ),
        },
    ),
    of(
        "HiDreamImageTransformer2DModel",
        {"HiDreamImagePipeline": Case(prepare=_small)},
        {"text_emb_dim": 2 * WIDTH},
    ),
    of("Lumina2Transformer2DModel", ("Lumina2Pipeline",), {"axes_lens": (300, 32, 32)}),
    of("LuminaNextDiT2DModel", ("LuminaPipeline",)),
    of(
        "ZImageTransformer2DModel",
        {
            "ZImagePipeline": Case(),
            "ZImageImg2ImgPipeline": Case(),
            "ZImageInpaintPipeline": Case(),
            "ZImageOmniPipeline": Case(
                {"siglip": lambda _: ImageEncoder(), "siglip_processor": lambda _: Processor()},
                {"image": [PICTURE]},
                {"siglip_feat_dim": WIDTH},
            ),
            "ZImageControlNetPipeline": Case({"controlnet": lambda _: _z_image_net(4)}),
            "ZImageControlNetInpaintPipeline": Case({"controlnet": lambda _: _z_image_net(9)}),
        },
    ),
    of(
        "PRXTransformer2DModel",
        ("PRXPipeline", "PRXPixelPipeline"),
        call={"use_resolution_binning": False},
    ),
    of(
        "Krea2Transformer2DModel",
        {"Krea2Pipeline": Case({"text_encoder_select_layers": (0, 1, 2)})},
        channels=1,
    ),
    of("OmniGenTransformer2DModel", ("OmniGenPipeline",), {"vocab_size": 64}),
    of(
        "Ideogram4Transformer2DModel",
        {
            "Ideogram4Pipeline": Case(
                {"unconditional_transformer": lambda family: family.denoiser()},
                {"guidance_schedule": [3.0, 3.0]},
                prepare=_without_layers,
            )
        },
        channels=1,
    ),
    of(
        "ErnieImageTransformer2DModel",
        ("ErnieImagePipeline",),
        {"in_channels": 16, "out_channels": 16, "patch_size": 1},
    ),
    of(
        "JoyImageEditTransformer3DModel",
        ("JoyImageEditPipeline",),
        space=32,
        cell=64,
        sizes=((16, 16), (13, 18)),
    ),
    of("JoyImageEditPlusTransformer3DModel", ("JoyImageEditPlusPipeline",)),
)
