"""Pipelines of transformers for videos; sizes are tokens of a frame."""

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance

from tests.support.pipelines.build import VIDEO, Case
from tests.support.pipelines.images import of
from tests.support.pipelines.stand_ins import Guardrail, ImageEncoder, Processor, TextEncoder
from tests.support.tiny_model import WIDTH

_COGVIDEOX = {"scheduler": diffusers.CogVideoXDDIMScheduler, "time": 4, "frames": 9}
_WAN = {"time": 4, "frames": 9, "scheduler": diffusers.UniPCMultistepScheduler}

_EDM = {"scheduler": lambda _: diffusers.EDMEulerScheduler()}
# Its sigmas would end, and so its timesteps begin, at zero otherwise.
_KARRAS = {"scheduler": lambda _: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}
_GUIDER = {"guider": lambda _: ClassifierFreeGuidance()}


class _SeeingEncoder(TextEncoder):
    def __init__(self):
        super().__init__()
        self.vision_tower = ImageEncoder()


def _this_size(pipe, h, w) -> None:
    """It knows sizes of a megapixel alone."""
    pipe.resolutions = [(w, h)]


VIDEOS = (
    of(
        "AllegroTransformer3DModel",
        ("AllegroPipeline",),
        scheduler=diffusers.EulerAncestralDiscreteScheduler,
        time=4,
        frames=5,
    ),
    of(
        "LatteTransformer3DModel",
        {"LattePipeline": Case(call={"video_length": 2}, config={"out_channels": 8})},
        scheduler=diffusers.DDIMScheduler,
        frames=2,
    ),
    of(
        "WanTransformer3DModel",
        {
            "WanPipeline": Case(),
            "WanImageToVideoPipeline": Case(config={"in_channels": 12, "image_dim": 16}),
            "WanVideoToVideoPipeline": Case(),
            "LucyEditPipeline": Case(config={"in_channels": 8}),
        },
        **_WAN,
    ),
    of(
        "ChronoEditTransformer3DModel",
        {"ChronoEditPipeline": Case(config={"in_channels": 12, "image_dim": 16})},
        time=4,
        frames=5,
    ),
    # Latents of what changes and of what does not, and a mask of 8×8 pixels.
    of("WanVACETransformer3DModel", ("WanVACEPipeline",), {"vace_in_channels": 4 + 4 + 64}, **_WAN),
    of(
        "WanAnimateTransformer3DModel",
        {"WanAnimatePipeline": Case(call={"pose_video": VIDEO, "face_video": VIDEO})},
        {"image_dim": WIDTH},
        **_WAN,
    ),
    of(
        "AnyFlowTransformer3DModel",
        {"AnyFlowPipeline": Case(call={"video": None})},
        time=4,
        frames=9,
    ),
    of(
        "SkyReelsV2Transformer3DModel",
        {
            "SkyReelsV2Pipeline": Case(),
            "SkyReelsV2ImageToVideoPipeline": Case(config={"in_channels": 12, "image_dim": 16}),
            "SkyReelsV2DiffusionForcingPipeline": Case(),
            "SkyReelsV2DiffusionForcingImageToVideoPipeline": Case(),
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Case(
                call={"overlap_history": 5, "base_num_frames": 9}
            ),
        },
        **_WAN,
    ),
    of(
        "CosmosTransformer3DModel",
        {
            "CosmosTextToWorldPipeline": Case(_EDM),
            "CosmosVideoToWorldPipeline": Case(
                _EDM, call={"video": None}, config={"in_channels": 5}
            ),
            # The last step changes next to nothing, and the first does not merge by default.
            "Cosmos2TextToImagePipeline": Case(_KARRAS, call={"num_inference_steps": 3}),
            "Cosmos2VideoToWorldPipeline": Case(
                _KARRAS,
                call={"video": None, "num_inference_steps": 3},
                config={"in_channels": 5},
            ),
            "Cosmos2_5_PredictBasePipeline": Case(
                call={
                    "image": None,
                    "prompt": None,
                    "prompt_embeds": lambda h, w: torch.rand(1, 9, WIDTH),
                    "negative_prompt_embeds": lambda h, w: torch.rand(1, 9, WIDTH),
                },
                config={"in_channels": 5},
            ),
        },
        time=4,
        frames=9,
        parts={"safety_checker": lambda _: Guardrail()},
    ),
    of(
        "EasyAnimateTransformer3DModel",
        {
            "EasyAnimatePipeline": Case(),
            "EasyAnimateInpaintPipeline": Case(
                call={
                    "video": lambda h, w: torch.rand(1, 3, 5, h, w),
                    "mask_video": lambda h, w: 255 * torch.ones(1, 1, 5, h, w),
                },
                config={"in_channels": 9},
            ),
        },
        time=4,
        frames=5,
        call={"negative_prompt": ""},
    ),
    of(
        "LTXVideoTransformer3DModel",
        {
            "LTXPipeline": Case(),
            "LTXImageToVideoPipeline": Case(),
            "LTXConditionPipeline": Case(),
            # It does not call its model in the last step.
            "LTXI2VLongMultiPromptPipeline": Case(call={"num_inference_steps": 3}),
        },
        space=32,
        time=8,
        cell=32,
        frames=9,
    ),
    of(
        "CogVideoXTransformer3DModel",
        {
            "CogVideoXPipeline": Case(),
            "CogVideoXImageToVideoPipeline": Case(config={"in_channels": 8}),
            "CogVideoXVideoToVideoPipeline": Case(),
            "CogVideoXFunControlPipeline": Case(config={"in_channels": 8}),
        },
        config={"attention_head_dim": 16},
        **_COGVIDEOX,
    ),
    of("MochiTransformer3DModel", ("MochiPipeline",), time=6, frames=7),
    of(
        "HunyuanVideoTransformer3DModel",
        {
            "HunyuanVideoPipeline": Case(),
            "HunyuanVideoImageToVideoPipeline": Case(
                call={
                    "prompt": None,
                    "prompt_embeds": lambda h, w: torch.rand(1, 9, WIDTH),
                    "pooled_prompt_embeds": lambda h, w: torch.rand(1, WIDTH),
                    "prompt_attention_mask": lambda h, w: torch.ones(1, 9),
                },
                config={"in_channels": 9, "image_condition_type": "latent_concat"},
            ),
            "HunyuanSkyreelsImageToVideoPipeline": Case(config={"in_channels": 8}),
        },
        time=4,
        frames=5,
    ),
    of(
        "HunyuanVideo15Transformer3DModel",
        {
            "HunyuanVideo15Pipeline": Case(),
            "HunyuanVideo15ImageToVideoPipeline": Case(config={"target_size": 96}),
        },
        {"in_channels": 9},
        time=4,
        frames=5,
        parts=_GUIDER,
    ),
    of(
        "MotifVideoTransformer3DModel",
        {
            "MotifVideoPipeline": Case(),
            "MotifVideoImage2VideoPipeline": Case(
                {
                    "text_encoder": lambda _: _SeeingEncoder(),
                    "feature_extractor": lambda _: Processor(),
                },
                config={"image_embed_dim": WIDTH},
            ),
        },
        {"in_channels": 9},
        time=4,
        frames=5,
        parts=_GUIDER,
    ),
    of(
        "Kandinsky5Transformer3DModel",
        {
            "Kandinsky5T2VPipeline": Case(),
            "Kandinsky5I2VPipeline": Case(call={"num_frames": 17}, config={"visual_cond": True}),
        },
        time=4,
        frames=5,
    ),
    of(
        "Kandinsky5Transformer3DModel",
        {
            "Kandinsky5T2IPipeline": Case(prepare=_this_size),
            "Kandinsky5I2IPipeline": Case(config={"visual_cond": True}, prepare=_this_size),
        },
    ),
    of(
        "Kandinsky6Transformer3DModel",
        {"Kandinsky6TI2VAPipeline": Case(call={"sample_audio": False, "image": None})},
        time=4,
        frames=5,
    ),
)
