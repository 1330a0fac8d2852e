"""ControlNets of diffusion transformers, tiny: their denoiser's inputs, and a picture."""

from collections.abc import Callable

import torch

from tests.support.tiny_model import WIDTH
from tests.support.tiny_transformers.images import (
    IMAGES,
    draw_flux,
    draw_hunyuan,
    draw_qwen,
    draw_sd3,
)
from tests.support.tiny_transformers.model import (
    HEADS,
    JOINT,
    POOLED,
    SQUARE,
    TinyTransformer,
)


def _controlled(inputs: Callable[..., dict]) -> Callable[..., dict]:
    def given(batch, h, w, normal) -> dict:
        own = inputs(batch, h, w, normal)
        return own | {"controlnet_cond": normal(*own["hidden_states"].shape)}

    return given


def _sd3_tokens(batch, h, w, normal) -> dict:
    """As of Stable Diffusion 3.5: latents that are tokens already, and no text."""
    own = {"hidden_states": normal(batch, h * w, WIDTH), "encoder_hidden_states": None}
    return _controlled(draw_sd3)(batch, h, w, normal) | own


def _flux_mode(batch, h, w, normal) -> dict:
    mode = {"controlnet_mode": torch.ones(batch, 1, dtype=torch.long)}
    return _controlled(draw_flux)(batch, h, w, normal) | mode


_SD3_CONTROLNET = SQUARE | HEADS | JOINT | POOLED | {"num_layers": 2, "pos_embed_max_size": 24}
CONTROLNETS = {
    "SD3ControlNetModel": TinyTransformer(
        "SD3ControlNetModel", _SD3_CONTROLNET, _controlled(draw_sd3)
    ),
    "SD3ControlNetModel of tokens": TinyTransformer(
        "SD3ControlNetModel",
        _SD3_CONTROLNET | {"joint_attention_dim": None, "use_pos_embed": False},
        _sd3_tokens,
    ),
    "FluxControlNetModel": TinyTransformer(
        "FluxControlNetModel",
        IMAGES["FluxTransformer2DModel"].config,
        _controlled(draw_flux),
        one_map=True,
    ),
    "QwenImageControlNetModel": TinyTransformer(
        "QwenImageControlNetModel",
        IMAGES["QwenImageTransformer2DModel"].config,
        _controlled(draw_qwen),
        one_map=True,
    ),
    "HunyuanDiT2DControlNetModel": TinyTransformer(
        "HunyuanDiT2DControlNetModel",
        {
            name: value
            for name, value in IMAGES["HunyuanDiT2DModel"].config.items()
            if name not in ("num_layers", "learn_sigma")
        }
        | {"transformer_num_layers": 4},
        _controlled(draw_hunyuan),
        one_map=True,
    ),
    "FluxControlNetModel with modes": TinyTransformer(
        "FluxControlNetModel",
        IMAGES["FluxTransformer2DModel"].config | {"num_mode": 2},
        _flux_mode,
        one_map=True,
    ),
}
