"""Training the diffusion transformer on the trained pipeline's latents and text features."""

from functools import partial
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from benchmarks.common.files import atomic_folder
from benchmarks.training import architectures
from benchmarks.training.data import MASK_CELLS, cached, masks
from benchmarks.training.loop import train
from benchmarks.training.losses import noisy_batch, transformer_loss
from benchmarks.training.shapes_models import (
    Settings,
    load_teacher,
    prompt_ids,
    scaled_latents,
)


class MaskedTransformer(nn.Module):
    """The transformer with a second, dense task: which parts of each patch the shape covers.

    >>> masked = MaskedTransformer(transformer, text_encoder)

    The masks are read off in the middle; that head is used in training only, and the text encoder
    stays as it is.
    """

    def __init__(self, transformer: PixArtTransformer2DModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder.requires_grad_(False)
        self.mask_head = nn.Linear(transformer.inner_dim, MASK_CELLS**2)
        blocks = transformer.transformer_blocks
        blocks[len(blocks) // 2 - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, given: Any, tokens: Tensor) -> None:
        self._middle = tokens

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """v [B, 4, h, w] and mask logits [B, patches, MASK_CELLS²]."""
        # As the tokenizer gives it: up to the first end token, which is the padding token too.
        attention_mask = ids.eq(self.text_encoder.config.eos_token_id).cumsum(1).le(1).long()
        with torch.no_grad():
            text = self.text_encoder(ids, attention_mask=attention_mask).last_hidden_state
        predicted = self.transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=attention_mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return predicted, self.mask_head(self._middle)


def train_transformer(settings: Settings) -> None:
    """Train the transformer, at half size and then at full size; save its pipeline.

    >>> train_transformer(settings)
    """
    pipe, digest = load_teacher(settings)
    ids = prompt_ids(settings, pipe.tokenizer)
    model = MaskedTransformer(architectures.build_transformer(), pipe.text_encoder)
    model = model.to(settings.device)
    compiled = torch.compile(model, dynamic=False, disable=not settings.compile)
    for size in (64, 128):
        stage = settings.stages[f"transformer-{size}"]
        patches = size // pipe.vae_scale_factor // model.transformer.config.patch_size
        draw = partial(
            noisy_batch,
            pipe.scheduler,
            scaled_latents(settings, pipe.vae, digest, size),
            ids[:-1],
            ids[-1],
            stage.batch,
        )
        covered = cached(
            settings.work / f"masks-{patches}-{settings.pictures}.pt",
            partial(masks, range(settings.pictures), patches),
        )

        def loss(generator: torch.Generator, draw: Any = draw, covered: Tensor = covered) -> Tensor:
            with settings.autocast():
                return transformer_loss(compiled, draw(generator), covered)

        metadata = settings.metadata | {"pipeline": digest}
        train(stage, model, loss, settings.work / f"transformer-{size}.pt", metadata)
    made = architectures.build_transformer_pipeline(pipe, model.transformer)
    with atomic_folder(settings.output / "transformer") as folder:
        made.to(torch.float16).save_pretrained(folder)
