"""Diffusers' own pipelines of tiny models with random weights, that need no download."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.support.tiny_model import WIDTH
from tests.support.tiny_unets import SD_TEXT_TOKENS, sd_unet, sdxl_unet


def tokenizer() -> CLIPTokenizer:
    """One token for each letter."""
    words = ["<|startoftext|>", "<|endoftext|>"]
    words += [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=SD_TEXT_TOKENS)


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=SD_TEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def autoencoder(seed: int = 2) -> AutoencoderKL:
    """8 px to one latent, as in Stable Diffusion."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=128,
    ).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )


def sd_components(unet: UNet2DConditionModel | None = None) -> dict:
    torch.manual_seed(3)
    return {
        "vae": autoencoder(),
        "text_encoder": CLIPTextModel(_text_config()).eval(),
        "tokenizer": tokenizer(),
        "unet": unet or sd_unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def build_pipeline(pipeline_class, components: dict):
    """A pipeline of any class, silent."""
    pipe = pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_pipeline(**unet_config) -> StableDiffusionPipeline:
    components = sd_components(sd_unet(**unet_config))
    return build_pipeline(StableDiffusionPipeline, components | {"requires_safety_checker": False})


def sdxl_components() -> dict:
    torch.manual_seed(4)
    return {
        "vae": autoencoder(),
        "text_encoder": CLIPTextModel(_text_config()).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config()).eval(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": sdxl_unet(),
        "scheduler": scheduler(),
    }


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    return build_pipeline(StableDiffusionXLPipeline, sdxl_components() | {"add_watermarker": False})


def sample(pipe, prompt: str | list[str] | None = "a cat", **call) -> Tensor:
    """Latents after two steps from one seed."""
    call = {"num_inference_steps": 2, "output_type": "latent"} | call
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images
