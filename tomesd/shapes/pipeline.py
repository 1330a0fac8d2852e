"""The models of the Shapes world: a small, real Stable Diffusion pipeline and a ViT classifier."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tomesd.shapes.world import COLORS, KINDS, SHAPES, Scene

# In a wheel they are installed beside this file; in a clone they stay at its top level.
_INSTALLED, _IN_CLONE = (Path(__file__).resolve().parents[up] / "assets" for up in (0, 2))
ASSETS = _INSTALLED if _INSTALLED.exists() else _IN_CLONE

# A prompt of the Shapes world is 11 words; with the start and end tokens 13.
_PROMPT_LENGTH = 16
_TEXT_WIDTH = 96

# The classifier has one group of logits for each thing that it reads off a picture.
LABELS = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "kind": KINDS,
    "ground": tuple(COLORS),
}


def load_pipeline(
    folder: Path = ASSETS / "pipeline", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The embedded Stable Diffusion of the Shapes world, 128×128 px.

    >>> load_pipeline()("a photo of a red heart on a blue striped background").images[0].size
    (128, 128)

    Raises FileNotFoundError if it is not there.
    """
    _require(folder)
    return StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)


def load_classifier(folder: Path = ASSETS / "classifier") -> ViTForImageClassification:
    """The embedded ViT that says what a picture of the Shapes world shows (see `read`)."""
    _require(folder)
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def _require(folder: Path) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"folder must hold a model, got {folder}, which does not exist: reinstall tomesd, or, "
            "in a clone, python scripts/train_shapes.py --output assets"
        )


def split_logits(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The classifier's logits [B, 28], one tensor for each of shape, color, kind and ground."""
    parts = logits.split([len(names) for names in LABELS.values()], dim=-1)
    return dict(zip(LABELS, parts, strict=True))


def read(logits: torch.Tensor) -> list[tuple[int, ...]]:
    """What each picture shows, as `Scene.labels` gives it, from the classifier's logits [B, 28]."""
    best = [part.argmax(-1) for part in split_logits(logits).values()]
    return [tuple(row) for row in torch.stack(best, dim=-1).tolist()]


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
