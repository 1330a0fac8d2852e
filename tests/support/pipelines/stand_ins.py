"""What a pipeline has besides its denoiser, replaced by what gives tensors of the right shape.

Text and image encoders, tokenizers, processors and autoencoders: none of them merges, and all that
the denoiser sees of them are numbers. A few lines serve for every pipeline.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding
from transformers.utils import ModelOutput

from tests.support.tiny_model import WIDTH

WORDS = 64
# Patches of a picture, and a class token.
IMAGE_TOKENS = 5


class Tokenizer:
    """One token for three characters; texts are padded as asked."""

    model_max_length = 77
    padding_side = "right"
    pad_token, eos_token, bos_token = "<pad>", "<eos>", "<bos>"
    pad_token_id, eos_token_id, bos_token_id = 0, 1, 2
    image_token, image_token_id = "<image>", 3
    vocab_size = WORDS

    def __init__(self, **changes: Any) -> None:
        self.added_tokens_encoder: dict[str, int] = {}
        self.__dict__ |= changes

    def __call__(
        self,
        text: Any = None,
        *_: Any,
        max_length: int | None = None,
        padding: Any = False,
        truncation: bool = False,
        return_tensors: str | None = None,
        **more: Any,
    ) -> BatchEncoding:
        text = more.get("text", text)
        rows = [self.encode(each) for each in ([text] if isinstance(text, str) else text)]
        if return_tensors is None:
            mask = [[1] * len(row) for row in rows]
            rows, mask = (rows[0], mask[0]) if isinstance(text, str) else (rows, mask)
            return BatchEncoding({"input_ids": rows, "attention_mask": mask})
        found = self.pad({"input_ids": rows}, max_length, padding)
        if more.get("return_length"):
            found["length"] = found["attention_mask"].sum(1)
        if more.get("images") is not None:
            found["pixel_values"] = torch.ones(1, 3, 8, 8)
            found["image_grid_thw"] = torch.ones(1, 3, dtype=torch.long)
        return found

    def pad(
        self, rows: Any, max_length: int | None = None, padding: Any = True, **_: Any
    ) -> BatchEncoding:
        rows = rows["input_ids"]
        longest = max(len(row) for row in rows)
        if padding == "max_length":
            longest = max_length or self.model_max_length
        rows = [row[:longest] for row in rows]
        ids = torch.tensor([row + [self.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def encode(self, text: Any, **_: Any) -> list[int]:
        text = str(text)
        chunks = [text[at : at + 3] for at in range(0, len(text), 3)]
        return [self.bos_token_id, *(4 + sum(map(ord, part)) % (WORDS - 4) for part in chunks), 1]

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return [str(token) for token in self.encode(text)]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return 5 if isinstance(tokens, str) else [5] * len(tokens)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **more: Any) -> Any:
        if not tokenize:
            return str(messages)
        nested = isinstance(messages[0], list | tuple)
        found = self([str(each) for each in messages] if nested else [str(messages)], **more)
        return found if more.get("return_dict") else found["input_ids"]

    def batch_decode(self, ids: Tensor, **_: Any) -> list[str]:
        return ["a cat"] * len(ids)

    def decode(self, ids: Any, **_: Any) -> str:
        return "a cat"

    @property
    def tokenizer(self) -> "Tokenizer":
        return self

    @property
    def image_processor(self) -> "Processor":
        return Processor()


class _Encoder(nn.Module):
    def __init__(self, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.width = width
        config = {"d_model": width} | config
        self.config = FrozenDict({"hidden_size": width, "projection_dim": width} | config)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class TextEncoder(_Encoder):
    """An embedding of each token. pooled_first: whether [0] of its output is one for the text."""

    def __init__(
        self, width: int = WIDTH, pooled_first: bool = False, depth: int = 37, **config: Any
    ) -> None:
        super().__init__(width, config)
        draw = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(torch.randn(WORDS, width, generator=draw))
        self.pooled_first, self.depth = pooled_first, depth
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, input_ids: Tensor | None = None, *_: Any, **more: Any) -> ModelOutput:
        tokens = self.layers[-1](self.table[input_ids.long() % WORDS])
        pooled = tokens.mean(1)
        names = {"last_hidden_state": tokens}
        if self.pooled_first:
            names = {"text_embeds": pooled} | names
        names |= {"pooler_output": pooled, "hidden_states": (tokens,) * self.depth}
        return ModelOutput(**names)

    @property
    def model(self) -> "TextEncoder":
        return self

    language_model = text_model = model
    final_layer_norm = nn.Identity()

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding.from_pretrained(self.table)

    def generate(self, **_: Any) -> Tensor:
        return torch.ones(1, 4, dtype=torch.long)


class ImageEncoder(_Encoder):
    def __init__(self, width: int = WIDTH, size: int = 8, **config: Any) -> None:
        super().__init__(width, {"image_size": size, "num_hidden_layers": 2} | config)
        draw = torch.Generator().manual_seed(8)
        self.table = nn.Parameter(torch.randn(3, width, generator=draw))

    def forward(self, pixel_values: Tensor | None = None, *_: Any, **__: Any) -> ModelOutput:
        pooled = pixel_values.to(self.dtype).mean((-1, -2)) @ self.table
        tokens = pooled[:, None].repeat(1, IMAGE_TOKENS, 1)
        return ModelOutput(
            image_embeds=pooled,
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=(tokens,) * 3,
        )

    @property
    def vision_model(self) -> "ImageEncoder":
        return self


class _Pictures(BatchEncoding):
    def to(self, *_: Any, **__: Any) -> "_Pictures":
        return self


class Processor:
    """Pictures as tensors of one size."""

    merge_size = 1

    size = crop_size = {"height": 8, "width": 8, "shortest_edge": 8}  # noqa: RUF012
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __call__(self, images: Any = None, *_: Any, **more: Any) -> BatchEncoding:
        images = more.get("images", images)
        count = len(images) if isinstance(images, list | tuple | Tensor) else 1
        draw = torch.Generator().manual_seed(9)
        pixels = torch.rand(count, 3, 8, 8, generator=draw)
        grid = torch.tensor([[1, 2, 2]] * count)
        return _Pictures({"pixel_values": pixels, "image_grid_thw": grid, "spatial_shapes": grid})

    preprocess = __call__

    def postprocess(self, image: Tensor, **_: Any) -> Tensor:
        return image

    def resize(self, image: Image.Image, *_: Any, **__: Any) -> Image.Image:
        return image


class Guardrail(_Encoder):
    """Lets everything pass, unchanged."""

    def __init__(self) -> None:
        super().__init__(1, {})
        self.table = nn.Parameter(torch.ones(1))

    def check_text_safety(self, *_: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


class _Posterior:
    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def sample(self, generator: Any = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


class _Encoded(SimpleNamespace):
    def __getitem__(self, _: int) -> _Posterior:
        return self.latent_dist


class Autoencoder(nn.Module):
    """Means over patches of pixels and of frames.

    channels: of its latents. space, time: how many pixels along a side, and frames, are one.
    """

    def __init__(self, channels: int = 4, space: int = 8, time: int = 1, **config: Any) -> None:
        super().__init__()
        self.channels, self.space, self.time = channels, space, time
        levels = (space - 1).bit_length() + 1
        self.config = FrozenDict(
            {
                "block_out_channels": (4,) * levels,
                "encoder_block_out_channels": (4,) * levels,
                "decoder_block_out_channels": (4,) * levels,
                "down_block_types": ("",) * levels,
                "latent_channels": channels,
                "z_dim": channels,
                "latents_mean": [0.1] * channels,
                "latents_std": [0.9] * channels,
                "scaling_factor": 0.5,
                "shift_factor": 0.1,
                "scale_factor_spatial": space,
                "scale_factor_temporal": time,
                "temporal_compression_ratio": time,
                "spatial_compression_ratio": space,
                "sample_size": 64,
                "in_channels": 3,
                "out_channels": 3,
                "batch_norm_eps": 1e-4,
                "patch_size": (2, 2),
                "force_upcast": False,
                "use_quant_conv": True,
                "invert_scale_latents": False,
            }
            | config
        )
        self.spatial_compression_ratio = self.scale_factor = space
        self.temporal_compression_ratio = time
        halvings = (time - 1).bit_length()
        self.temperal_downsample = [False] * (levels - 1 - halvings) + [True] * halvings
        self.latent_channels = channels
        self.use_slicing = self.use_tiling = False
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(4 * channels, affine=False)
        self.register_buffer("latents_mean", torch.full((channels,), 0.1))
        self.register_buffer("latents_std", torch.full((channels,), 0.9))

    dtype = _Encoder.dtype
    device = _Encoder.device

    def encode(self, x: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        if x.ndim == 5:
            x = x[:, :, :: self.time]
            steps = (1, self.space, self.space)
            x = F.avg_pool3d(x, steps, ceil_mode=True)
        else:
            x = F.avg_pool2d(x, self.space, ceil_mode=True)
        mean = self._channels(x, self.channels)
        if not return_dict:
            return (_Posterior(mean),)
        found = {"latent_dist": _Posterior(mean), "latent": mean, "latents": mean}
        return _Encoded(**found)

    def decode(self, z: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        x = self._channels(z, 3)
        if x.ndim == 5:
            frames = 1 + (x.shape[2] - 1) * self.time
            size = (frames, x.shape[3] * self.space, x.shape[4] * self.space)
        else:
            size = (x.shape[2] * self.space, x.shape[3] * self.space)
        x = F.interpolate(x, size)
        return DecoderOutput(x) if return_dict else (x,)

    def _channels(self, x: Tensor, count: int) -> Tensor:
        parts = [x * (-0.9) ** turn for turn in range(-(-count // x.shape[1]))]
        return torch.cat(parts, dim=1)[:, :count]

    def register_to_config(self, **changes: Any) -> None:
        self.config = FrozenDict({**self.config, **changes})

    def enable_slicing(self) -> None: ...

    disable_slicing = enable_tiling = disable_tiling = enable_slicing
