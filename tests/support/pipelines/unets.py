"""Pipelines of UNets; sizes are latents, the tokens of the finest level."""

import inspect
from dataclasses import replace

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

from tests.support import tiny_unets
from tests.support.pipelines.build import PICTURE, Case, Family, draw
from tests.support.pipelines.stand_ins import (
    Autoencoder,
    ImageEncoder,
    Processor,
    TextEncoder,
)
from tests.support.tiny_model import WIDTH, randomize_zeros
from tests.support.tiny_unets import FRAMES, controlnet, sd_unet, sdxl_unet

SIZES = ((8, 8), (9, 13))
NOTHING = Case()


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler()


def _controlnet(family: Family):
    return controlnet(family.denoiser())


# As many as ControlNet-XS is made for.
_TWO_LAYERS = {"layers_per_block": 2}


def _union(family: Family):
    """The UNet's own configuration, as far as it has it, and a transformer of its pictures."""
    torch.manual_seed(2)
    known = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    config = {key: value for key, value in family.denoiser().config.items() if key in known}
    net = diffusers.ControlNetUnionModel(
        **config,
        conditioning_embedding_out_channels=(8,) * 4,
        num_trans_channel=16,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=16,
        num_control_type=2,
    )
    randomize_zeros(net, std=0.1)
    return net.eval()


def _side_net(family: Family):
    """Of ControlNet-XS."""
    return diffusers.ControlNetXSAdapter.from_unet(
        family.denoiser(**_TWO_LAYERS), size_ratio=1, conditioning_embedding_out_channels=(8,) * 4
    )


def _adapter(_: Family):
    torch.manual_seed(3)
    return diffusers.T2IAdapter(3, (16, 32, 32), num_res_blocks=1).eval()


def _adapter_xl(_: Family):
    torch.manual_seed(3)
    return diffusers.T2IAdapter(3, (16, 16, 32, 32), 1, 16, "full_adapter_xl").eval()


_CONTROLNET = {"controlnet": _controlnet}
_UNION = {"controlnet": _union}
_PAG = {"pag_applied_layers": ["down", "mid"]}
_MARIGOLD = {"processing_resolution": 0, "output_type": "np"}
_ZERO = {"video_length": FRAMES, "t0": 0, "t1": 1}
_EVERY_STEP = {"strength": 1.0}


# Attention is not in transformers there, as in the published one.
_LATENT_UPSCALER = {
    "in_channels": 8,
    "time_cond_proj_dim": 128 + WIDTH,
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "block_out_channels": (16, 32, 32),
    "mid_block_type": None,
    "act_fn": "gelu",
    "norm_num_groups": None,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "attention_head_dim": 8,
}
_UNCLIP = {
    "image_normalizer": lambda _: StableUnCLIPImageNormalizer(WIDTH),
    "image_noising_scheduler": lambda _: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
}
_CLASSES = {
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2 * WIDTH,
}


class _ExampleEncoder(ImageEncoder):
    """One token, and one for no picture."""

    def forward(self, pixel_values, return_uncond_vector=False):
        token = super().forward(pixel_values).image_embeds[:, None]
        return (token, torch.zeros_like(token)) if return_uncond_vector else token


class _QFormer(ImageEncoder):
    def forward(self, image_input, text_input, return_dict=False):
        return torch.ones(1, self.config.num_query_tokens, self.width)


class _ContextEncoder(TextEncoder):
    """The tokens of a picture are among the text's."""

    def forward(self, input_ids, ctx_embeddings=None, ctx_begin_pos=None):
        (tokens, *_) = super().forward(input_ids).to_tuple()
        found = [tokens] if ctx_embeddings is None else [ctx_embeddings, tokens]
        return (torch.cat(found, dim=1),)


_BLIP = {
    "qformer": lambda _: _QFormer(num_query_tokens=2),
    "text_encoder": lambda _: _ContextEncoder(max_position_embeddings=20),
    "image_processor": lambda _: Processor(),
}
_SUBJECT = {
    "prompt": ["a cat"],
    "reference_image": PICTURE,
    "source_subject_category": ["cat"],
    "target_subject_category": ["dog"],
    "output_type": "pt",
}


def _second_level(h, w):
    return (h // 16, w // 16)


def _gligen(attention_type="gated"):
    return sd_unet(attention_type=attention_type)


def _invert(pipe, h, w) -> None:
    pipe.invert(
        draw(h, w), num_inversion_steps=3, skip=0.3, generator=torch.Generator().manual_seed(0)
    )


def _diff_edit(pipe, h, w) -> dict:
    draws = torch.Generator().manual_seed(0)
    inverted = pipe.invert(
        "a cat", draw(h, w), inpaint_strength=1.0, num_inference_steps=2, generator=draws
    )
    mask = torch.zeros(1, h // 8, w // 8)
    mask[:, : h // 16] = 1
    return {"image_latents": inverted.latents, "mask_image": mask, "inpaint_strength": 1.0}


_THREE_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
_LEDITS = Case(
    {
        "scheduler": lambda _: diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=2
        )
    },
    {"editing_prompt": ["a dog"], "num_inference_steps": None},
    sizes=((8, 8), (12, 16)),
    prepare=_invert,
)
SD = Family(
    sd_unet,
    {
        "StableDiffusionPipeline": NOTHING,
        "StableDiffusionImg2ImgPipeline": NOTHING,
        "StableDiffusionInpaintPipeline": NOTHING,
        "StableDiffusionInpaintPipelineLegacy": NOTHING,
        "StableDiffusionInstructPix2PixPipeline": Case(config={"in_channels": 8}),
        "StableDiffusionDepth2ImgPipeline": Case(
            {"depth_estimator": None},
            {"depth_map": lambda h, w: torch.rand(1, h, w)},
            {"in_channels": 5},
        ),
        "StableDiffusionUpscalePipeline": Case(
            {"low_res_scheduler": lambda _: DDPMScheduler()},
            {
                "image": lambda h, w: torch.rand(1, 3, h // 8, w // 8),
                "noise_level": 20,
                "output_type": "np",
            },
            {"in_channels": 7, "num_class_embeds": 1000},
        ),
        "StableDiffusionLatentUpscalePipeline": Case(
            {"scheduler": lambda _: _euler()},
            {"image": lambda h, w: torch.rand(1, 4, (h + 8) // 16, (w + 8) // 16)},
            _LATENT_UPSCALER,
        ),
        "StableDiffusionImageVariationPipeline": Case(),
        "StableDiffusionControlNetPipeline": Case(_CONTROLNET),
        "StableDiffusionControlNetImg2ImgPipeline": Case(_CONTROLNET),
        "StableDiffusionControlNetInpaintPipeline": Case(_CONTROLNET),
        "StableDiffusionControlNetXSPipeline": Case({"controlnet": _side_net}, config=_TWO_LAYERS),
        "StableDiffusionAdapterPipeline": Case({"adapter": _adapter}),
        "StableDiffusionPAGPipeline": Case(_PAG),
        "StableDiffusionPAGImg2ImgPipeline": Case(_PAG),
        "StableDiffusionPAGInpaintPipeline": Case(_PAG),
        "StableDiffusionControlNetPAGPipeline": Case(_PAG | _CONTROLNET),
        "StableDiffusionControlNetPAGInpaintPipeline": Case(_PAG | _CONTROLNET),
        "LatentConsistencyModelPipeline": Case(
            {"scheduler": lambda _: LCMScheduler()}, config={"time_cond_proj_dim": 8}
        ),
        "LatentConsistencyModelImg2ImgPipeline": Case(
            {"scheduler": lambda _: LCMScheduler()}, config={"time_cond_proj_dim": 8}
        ),
        # It reads maps of a quarter of the latents' sides.
        "LEditsPPPipelineStableDiffusion": replace(_LEDITS, config=_THREE_LEVELS),
        "MarigoldDepthPipeline": Case({"prediction_type": "depth"}, _MARIGOLD, {"in_channels": 8}),
        "MarigoldNormalsPipeline": Case(
            {"prediction_type": "normals"}, _MARIGOLD, {"in_channels": 8}
        ),
        "MarigoldIntrinsicsPipeline": Case(
            {"prediction_type": "intrinsics", "target_properties": {"target_names": ["albedo"]}},
            _MARIGOLD,
            {"in_channels": 8},
        ),
        "CycleDiffusionPipeline": Case(
            # The last variance would be zero otherwise, and is divided by.
            {"scheduler": lambda _: DDIMScheduler(set_alpha_to_one=False)},
            {"source_prompt": "a dog"},
        ),
        "PaintByExamplePipeline": Case(
            {"image_encoder": lambda _: _ExampleEncoder()},
            {"example_image": PICTURE},
            {"in_channels": 9},
        ),
        "SemanticStableDiffusionPipeline": Case(call={"editing_prompt": ["a dog"]}),
        "StableDiffusionAttendAndExcitePipeline": Case(
            call={"token_indices": [1], "max_iter_to_alter": 1, "attn_res": _second_level},
            sizes=((8, 8), (10, 14)),
        ),
        "StableDiffusionDiffEditPipeline": Case(
            {
                "inverse_scheduler": lambda _: diffusers.DDIMInverseScheduler(),
                "requires_safety_checker": False,
            },
            prepare=_diff_edit,
        ),
        "StableDiffusionGLIGENPipeline": Case(
            {"unet": lambda _: _gligen()},
            {"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
        ),
        "StableDiffusionGLIGENTextImagePipeline": Case(
            {
                "unet": lambda _: _gligen("gated-text-image"),
                "processor": lambda _: Processor(),
                "image_project": lambda _: diffusers.pipelines.stable_diffusion.CLIPImageProjection(
                    WIDTH
                ),
            },
            {
                "gligen_phrases": ["a dog"],
                "gligen_images": [PICTURE],
                "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
            },
        ),
        "StableDiffusionLDM3DPipeline": Case(call={"output_type": "np"}),
        "StableDiffusionModelEditingPipeline": Case(),
        "StableDiffusionPanoramaPipeline": Case(),
        "StableDiffusionParadigmsPipeline": Case(
            {"scheduler": lambda _: diffusers.DDIMParallelScheduler()}
        ),
        "StableDiffusionPipelineSafe": Case(),
        "StableDiffusionPix2PixZeroPipeline": Case(
            call={
                "source_embeds": lambda h, w: torch.rand(1, 77, WIDTH),
                "target_embeds": lambda h, w: torch.rand(1, 77, WIDTH),
            }
        ),
        "StableDiffusionSAGPipeline": Case(),
        "TextToVideoZeroPipeline": Case(call=_ZERO),
        "AltDiffusionPipeline": Case(),
        "AltDiffusionImg2ImgPipeline": Case(),
        "StableUnCLIPPipeline": Case(
            _UNCLIP
            | {
                "prior": lambda _: diffusers.PriorTransformer(
                    num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1
                ),
                "prior_text_encoder": lambda _: TextEncoder(pooled_first=True),
                "prior_scheduler": lambda _: diffusers.UnCLIPScheduler(),
            },
            {"prior_num_inference_steps": 2},
            _CLASSES,
        ),
        "StableUnCLIPImg2ImgPipeline": Case(_UNCLIP, {}, _CLASSES),
        "BlipDiffusionPipeline": Case(_BLIP, _SUBJECT),
        "BlipDiffusionControlNetPipeline": Case(
            _BLIP | _CONTROLNET, _SUBJECT | {"condtioning_image": PICTURE}
        ),
        "LDMTextToImagePipeline": Case(
            {"vqvae": lambda family: Autoencoder(), "bert": lambda _: TextEncoder()},
            {"output_type": "np"},
        ),
    },
    DDIMScheduler,
    cell=8,
    sizes=SIZES,
)

SDXL = Family(
    sdxl_unet,
    {
        "StableDiffusionXLPipeline": NOTHING,
        "StableDiffusionXLImg2ImgPipeline": Case(call=_EVERY_STEP),
        "StableDiffusionXLInpaintPipeline": NOTHING,
        "StableDiffusionXLInstructPix2PixPipeline": Case(config={"in_channels": 8}),
        "StableDiffusionXLControlNetPipeline": Case(_CONTROLNET),
        "StableDiffusionXLControlNetImg2ImgPipeline": Case(_CONTROLNET),
        "StableDiffusionXLControlNetInpaintPipeline": Case(_CONTROLNET),
        "StableDiffusionXLControlNetUnionPipeline": Case(
            _UNION, {"control_image": [PICTURE], "control_mode": [0]}
        ),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": Case(
            _UNION, {"control_image": [PICTURE], "control_mode": [0]}
        ),
        "StableDiffusionXLControlNetUnionInpaintPipeline": Case(
            _UNION, {"control_image": [PICTURE], "control_mode": [0]}
        ),
        "StableDiffusionXLControlNetXSPipeline": Case(
            {"controlnet": _side_net}, config=_TWO_LAYERS
        ),
        "StableDiffusionXLAdapterPipeline": Case(
            {"adapter": _adapter_xl}, sizes=((8, 8), (10, 14))
        ),
        "StableDiffusionXLPAGPipeline": Case({"pag_applied_layers": ["mid"]}),
        "StableDiffusionXLPAGImg2ImgPipeline": Case({"pag_applied_layers": ["mid"]}, _EVERY_STEP),
        "StableDiffusionXLPAGInpaintPipeline": Case({"pag_applied_layers": ["mid"]}),
        "StableDiffusionXLControlNetPAGPipeline": Case(
            {"pag_applied_layers": ["mid"]} | _CONTROLNET
        ),
        "StableDiffusionXLControlNetPAGImg2ImgPipeline": Case(
            {"pag_applied_layers": ["mid"]} | _CONTROLNET
        ),
        "LEditsPPPipelineStableDiffusionXL": _LEDITS,
        "TextToVideoZeroSDXLPipeline": Case(call=_ZERO),
    },
    DDIMScheduler,
    cell=8,
    sizes=SIZES,
)


def _motion(**config):
    return tiny_unets.TINY["UNetMotionModel"].build(**config)


MOTION = Family(
    _motion,
    {
        "AnimateDiffPipeline": Case(),
        "AnimateDiffVideoToVideoPipeline": Case(),
        "AnimateDiffControlNetPipeline": Case(
            {"controlnet": lambda _: tiny_unets.TINY["ControlNetModel"].build()}
        ),
        "AnimateDiffVideoToVideoControlNetPipeline": Case(
            {"controlnet": lambda _: tiny_unets.TINY["ControlNetModel"].build()}
        ),
        "AnimateDiffSparseControlNetPipeline": Case(
            {"controlnet": lambda _: tiny_unets.TINY["SparseControlNetModel"].build()}
        ),
        "AnimateDiffPAGPipeline": Case({"pag_applied_layers": ["mid"]}),
        "AnimateDiffSDXLPipeline": Case(
            config={
                "cross_attention_dim": 2 * WIDTH,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
            }
        ),
        "PIAPipeline": Case(config={"in_channels": 9}),
    },
    DDIMScheduler,
    cell=8,
    frames=FRAMES,
    sizes=SIZES,
    parts={"motion_adapter": None},
)
SVD = Family(
    lambda **config: tiny_unets.TINY["UNetSpatioTemporalConditionModel"].build(**config),
    {"StableVideoDiffusionPipeline": Case()},
    _euler,
    cell=8,
    frames=FRAMES,
    sizes=((8, 8), (6, 10)),
)
VIDEO_3D = Family(
    lambda **config: tiny_unets.TINY["UNet3DConditionModel"].build(**config),
    {"TextToVideoSDPipeline": Case(), "VideoToVideoSDPipeline": Case()},
    DDIMScheduler,
    cell=8,
    frames=FRAMES,
    sizes=SIZES,
)
I2VGEN = Family(
    lambda **config: tiny_unets.TINY["I2VGenXLUNet"].build(**config),
    {"I2VGenXLPipeline": Case()},
    DDIMScheduler,
    cell=8,
    frames=FRAMES,
    sizes=SIZES,
)
UNETS = (SD, SDXL, MOTION, SVD, VIDEO_3D, I2VGEN)
