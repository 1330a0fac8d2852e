"""Real diffusers models and pipelines, tiny and with random weights, that need no download."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TEXT_WIDTH = 16
TEXT_LENGTH = 12


def sd_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Like Stable Diffusion 1: transformers at every level but the coarsest, and in the middle."""
    torch.manual_seed(seed)
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**defaults | config).eval()


def sdxl_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Like SDXL: no attention at the finest level, several blocks in each transformer."""
    torch.manual_seed(seed)
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    }
    return UNet2DConditionModel(**defaults | config).eval()


def controlnet(unet: UNet2DConditionModel, seed: int = 1) -> ControlNetModel:
    """A ControlNet for the UNet, with weights of its own, so that it has an effect."""
    torch.manual_seed(seed)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * 4)
    for parameter in model.parameters():
        # A ControlNet's connections start at zero.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def unet_inputs(unet, batch: int = 2, h: int = 10, w: int = 14, seed: int = 0) -> dict:
    """What a pipeline hands to a UNet in one step, for latents of h×w."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        # The same numbers in every precision.
        return torch.randn(shape, generator=draw).to(unet.dtype)

    inputs = {
        "sample": normal(batch, unet.config.in_channels, h, w),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(batch, TEXT_LENGTH, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal(batch, TEXT_WIDTH),
            "time_ids": torch.ones(batch, 6),
        }
    return inputs


@torch.no_grad()
def predict(unet, **kwargs) -> torch.Tensor:
    """The UNet's output for `unet_inputs(unet, **kwargs)`; a timestep may be given too."""
    timestep = kwargs.pop("timestep", torch.tensor(500))
    return unet(**unet_inputs(unet, **kwargs) | {"timestep": timestep}).sample


def tokenizer() -> CLIPTokenizer:
    """One token for each letter."""
    words = ["<|startoftext|>", "<|endoftext|>"]
    words += [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_LENGTH)


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
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


def build(pipeline_class, components: dict):
    """A pipeline of any class, silent."""
    pipe = pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_pipeline(**unet_config) -> StableDiffusionPipeline:
    components = sd_components(sd_unet(**unet_config))
    return build(StableDiffusionPipeline, components | {"requires_safety_checker": False})


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
    return build(StableDiffusionXLPipeline, sdxl_components() | {"add_watermarker": False})


def hooks(model: torch.nn.Module) -> int:
    """How many forward hooks there are in a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
