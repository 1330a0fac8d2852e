"""Full-size UNets with random weights: a model's speed does not depend on its weights.

Imports nothing of `tomesd`, since the process of tomesd==0.1.3 runs this code too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The UNet of Stable Diffusion v1.5: 859,520,964 parameters.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

# The UNet of Stable Diffusion XL base: 2,567,463,684 parameters.
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# The length of CLIP's prompts, the same in all Stable Diffusion models.
# Of what is timed: in the middle of an image.
TIMESTEP = 500
PROMPT_TOKENS = 77


@dataclass(frozen=True)
class Denoiser:
    """A denoiser's configuration; this one is a UNet's.

    >>> denoiser("sd15").empty().config.sample_size
    64

    pixels: side of a latent in pixels. size: default side of the picture, in pixels. batch: of one
    picture, 2 with guidance.
    """

    name: str
    config: dict[str, Any]
    pixels: int
    size: int = 512
    batch: int = 2

    @property
    def largest(self) -> int | None:
        """The side of the largest picture in pixels; None if there is no limit."""
        return None

    def empty(self) -> Any:
        """The model on the meta device."""
        return empty_unet(self.config)

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model with random weights from a fixed seed."""
        return with_weights(self.empty(), device, dtype)

    def inputs(
        self, batch: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[tuple, dict[str, Any]]:
        """Arguments of one forward on size×size latents: (args, kwargs)."""
        return unet_inputs(self.config, batch, size, device, dtype)

    def levels(self, size: int) -> "list[Level]":
        """Every level with attention at size×size latents, finest first."""
        return levels(self.config, size)


def denoiser(model: str) -> Denoiser:
    """The configuration of a known model or of a folder.

    >>> denoiser("sd15").config["block_out_channels"]
    [320, 640, 1280, 1280]

    model: "sd15", "sdxl", or a folder in diffusers' format, of a pipeline or a UNet, of which only
        the configuration is read.
    Raises FileNotFoundError if the folder has no configuration and ValueError if it is of another
    model, or of a UNet with other conditions than text.
    """
    known = {"sd15": SD15, "sdxl": SDXL}
    if model in known:
        return Denoiser(model, known[model], pixels=8)
    folder = Path(model)
    files = [folder / "unet" / "config.json", folder / "config.json"]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"model must be sd15, sdxl or a folder with unet/config.json or config.json, "
            f"got {model!r}"
        )
    config = json.loads(found.read_text())
    if config.get("_class_name") != "UNet2DConditionModel":
        raise ValueError(
            f"model must hold a UNet2DConditionModel, got {config.get('_class_name')!r} in {found}"
        )
    if config.get("addition_embed_type") not in (None, "text_time") or config.get(
        "class_embed_type"
    ):
        raise ValueError(
            "model must be conditioned on text as SD or SDXL are, got "
            f"addition_embed_type={config.get('addition_embed_type')!r} and "
            f"class_embed_type={config.get('class_embed_type')!r}"
        )
    autoencoder = folder / "vae" / "config.json"
    pixels = 8
    if autoencoder.is_file():
        pixels = 2 ** (len(json.loads(autoencoder.read_text())["block_out_channels"]) - 1)
    return Denoiser(folder.resolve().name, config, pixels)


def empty_unet(config: dict[str, Any]) -> Any:
    """The UNet on the meta device: shapes without values.

    >>> sum(p.numel() for p in empty_unet(SD15).parameters())
    859520964
    """
    from diffusers import UNet2DConditionModel  # Late: the import takes seconds.

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def build_unet(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The UNet with random weights.

    >>> unet = build_unet(SD15, torch.device("cpu"), torch.float32)
    """
    return with_weights(empty_unet(config), device, dtype)


def with_weights(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model on the meta device with random weights, without a second copy in memory.

    >>> unet = with_weights(empty_unet(SD15), torch.device("cpu"), torch.float32)

    The seed is fixed, and weights are scaled by their fan-in, so that activations stay finite in
    half precision too. Buffers, such as tables of positions, are random as well.
    """
    # Module's own `to`: diffusers' one warns about layers that should stay in float32.
    model = nn.Module.to(model, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for buffer in model.buffers():
        buffer.normal_(generator=generator)
    return model


def share_weights(model: Any) -> Any:
    """Another model that shares the weights, to be patched and compiled independently.

    >>> twin = share_weights(unet)
    """
    with torch.device("meta"):
        twin = type(model).from_config(dict(model.config))
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def unet_inputs(
    config: dict[str, Any], batch: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one forward, from noise: (args, kwargs).

    >>> args, kwargs = unet_inputs(SD15, 2, 64, torch.device("cpu"), torch.float32)
    >>> unet(*args, **kwargs)[0].shape
    torch.Size([2, 4, 64, 64])

    size: of the latents, height and width.
    """
    text = (batch, PROMPT_TOKENS, config["cross_attention_dim"])
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": noise(text, device, dtype),
        "return_dict": False,
    }
    if config.get("addition_embed_type") == "text_time":
        # Six numbers (sizes and crops) are embedded, the rest is the pooled text.
        times = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - times
        kwargs["added_cond_kwargs"] = {
            "text_embeds": noise((batch, pooled), device, dtype),
            "time_ids": noise((batch, 6), device, dtype),
        }
    latents = noise((batch, config["in_channels"], size, size), device, dtype)
    return (latents, torch.tensor(TIMESTEP, device=device)), kwargs


def noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normal noise, the same on every device.

    >>> tokens = noise((2, 4096, 320), torch.device("cpu"), torch.float32)
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@dataclass(frozen=True)
class Level:
    """Transformer blocks with the same h×w tokens of so many channels.

    >>> Level(h=64, w=64, channels=320, blocks=5)
    """

    h: int
    w: int
    channels: int
    blocks: int


def levels(config: dict[str, Any], size: int) -> list[Level]:
    """Every level with attention at latents of this size, finest first, by shapes alone.

    >>> levels(SD15, 64)[0]
    Level(h=64, w=64, channels=320, blocks=5)
    """
    unet = empty_unet(config)
    blocks: dict[tuple[int, int, int], int] = {}

    def count(transformer: Any, args: tuple) -> None:
        _, channels, h, w = args[0].shape
        key = (h, w, channels)
        blocks[key] = blocks.get(key, 0) + len(transformer.transformer_blocks)

    for module in unet.modules():
        if hasattr(module, "transformer_blocks"):
            module.register_forward_pre_hook(count)
    args, kwargs = unet_inputs(config, 1, size, torch.device("meta"), torch.float32)
    with torch.no_grad():
        unet(*args, **kwargs)
    found = [Level(h, w, channels, n) for (h, w, channels), n in blocks.items()]
    return sorted(found, key=lambda level: (-level.h * level.w, level.channels))
