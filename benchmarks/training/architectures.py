"""The architectures of the embedded models, with random weights."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tomesd.shapes.pipeline import LABELS
from tomesd.shapes.world import COLORS, KINDS, SHAPES, Scene

# A prompt of the Shapes world has 11 words; with the start and end tokens 13.
_PROMPT_LENGTH = 16
_TEXT_WIDTH = 96
# Of the embedding of the guidance in the few-step UNet.
GUIDANCE_WIDTH = 64


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the Shapes world is one token."""
    words = {
        word
        for color in COLORS
        for shape in SHAPES
        for kind in KINDS
        for word in Scene(shape, color, kind, color).prompt.split()
    }
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=list(alphabet),
        end_of_word_suffix="</w>",
    )
    # Each single character is a word too, so that any other word can be spelled out.
    bpe.train_from_iterator([*sorted(words), " ".join(alphabet)], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=bpe.get_vocab(), merges=merges, model_max_length=_PROMPT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_autoencoder() -> AutoencoderKL:
    """128×128 px to 32×32×4 latents; convolutions only, so any multiple of 4 px goes."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        norm_num_groups=16,
        sample_size=128,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Transformer blocks at 1024, 256 and 64 tokens for a 128×128 px picture."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=_TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_pipeline(
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_few_step_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet that is told the guidance as well, which changes nothing yet."""
    told = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=GUIDANCE_WIDTH)
    told.register_to_config(_name_or_path="")
    told.load_state_dict(unet.state_dict(), strict=False)
    torch.nn.init.zeros_(told.time_embedding.cond_proj.weight)
    return told


def build_few_step_scheduler() -> LCMScheduler:
    return LCMScheduler.from_config(build_scheduler().config)


def build_transformer() -> PixArtTransformer2DModel:
    """8 blocks at 256 tokens for a 128×128 px picture, 2.3 million parameters."""
    return PixArtTransformer2DModel(
        sample_size=32,
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=_TEXT_WIDTH,
        out_channels=4,
    )


def build_transformer_pipeline(
    pipe: StableDiffusionPipeline, transformer: PixArtTransformer2DModel
) -> PixArtAlphaPipeline:
    """PixArt's pipeline with the tokenizer, text encoder, autoencoder and scheduler of another."""
    return PixArtAlphaPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        transformer=transformer,
        scheduler=pipe.scheduler,
    )


def build_classifier() -> ViTForImageClassification:
    """12 layers over 16×16 patches of 8×8 px and a class token."""
    names = [f"{group}: {name}" for group, names in LABELS.items() for name in names]
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=2,
            image_size=128,
            patch_size=8,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )


def build_image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 128, "width": 128})
