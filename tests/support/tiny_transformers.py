"""Diffusers' own diffusion transformers, tiny and with random weights, and how each is called.

Sizes are token grids (h, w), also where a model takes latents or packed tokens.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tomesd

TEXT = 5
WIDTH = 16


@dataclass
class Tiny:
    """One kind of model.

    name: of its class in diffusers. inputs: (batch, h, w, draw), where draw(*shape) gives random
    numbers of the model's precision. frames: of its videos, as far as they are tokens of one
    sample. alone: how many calls of attention are in blocks that are left alone. image_first:
    whether image tokens come before the text's. one_map: whether all samples merge alike.
    """

    name: str
    config: dict
    inputs: Callable[..., dict]
    frames: int = 1
    alone: int = 0
    image_first: bool = False
    one_map: bool = False

    def model(self, seed: int = 0, **config) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(diffusers, self.name)(**self.config | config).eval()
        for parameter in model.parameters():
            # Gates and last layers start at zero: nothing of what blocks do would be seen.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        return model

    def given(
        self, batch: int = 2, h: int = 5, w: int = 7, seed: int = 0, dtype=torch.float32
    ) -> dict:
        """What a pipeline would call the model with."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # The same numbers in every precision.
            return torch.randn(shape, generator=draw).to(dtype)

        return self.inputs(batch, h, w, normal)

    def call(self, model, batch: int = 2, h: int = 5, w: int = 7, seed: int = 0, **given) -> Tensor:
        inputs = self.given(batch, h, w, seed, model.dtype)
        output = model(**inputs | given, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output

    @torch.no_grad()
    def predict(self, model, **size) -> Tensor:
        return self.call(model, **size)

    def attention(self, model, **size) -> list[tuple[int, int]]:
        """Queries and keys of every call of attention."""
        with Attention() as attention:
            self.predict(model, **size)
        return attention.seen

    def patched(self, when: str, change: Callable[[Any], object]) -> Any:
        """A model that merges and to which something was done, before or after patching."""
        model = self.model()
        if when == "before":
            change(model)
        tomesd.apply_patch(model)
        if when == "after":
            change(model)
        return model


def _latents(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
    }


def _text(batch, normal, width: int = WIDTH) -> dict:
    return {"encoder_hidden_states": normal(batch, TEXT, width)}


def _sd3(batch, h, w, normal) -> dict:
    pooled = {"pooled_projections": normal(batch, WIDTH)}
    return _latents(batch, h, w, normal) | _text(batch, normal) | pooled


def _auraflow(batch, h, w, normal) -> dict:
    return _latents(batch, h, w, normal) | _text(batch, normal)


def ids(h: int, w: int, picture: int = 0) -> Tensor:
    """Flux's image ids: picture, row, column."""
    own = torch.zeros(h, w, 3)
    own[..., 0] = picture
    own[..., 1] += torch.arange(h)[:, None]
    own[..., 2] += torch.arange(w)
    return own.flatten(0, 1)


def _flux(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "pooled_projections": normal(batch, WIDTH),
        "img_ids": ids(h, w),
        "txt_ids": torch.zeros(TEXT, 3),
    } | _text(batch, normal)


def _flux_kin(batch, h, w, normal) -> dict:
    """Without a pooled text."""
    given = _flux(batch, h, w, normal)
    del given["pooled_projections"]
    return given


def _chroma(batch, h, w, normal) -> dict:
    mask = torch.ones(batch, TEXT + h * w)
    mask[0, 3:TEXT] = 0
    return _flux_kin(batch, h, w, normal) | {"attention_mask": mask.to(normal(1).dtype)}


def _flux2(batch, h, w, normal) -> dict:
    image = torch.cat([ids(h, w), torch.zeros(h * w, 1)], dim=1)
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": normal(batch, h * w, 4),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": image.expand(batch, -1, -1),
        "txt_ids": text.expand(batch, -1, -1),
    } | _text(batch, normal)


def _qwen(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, h * w, 16),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "img_shapes": [[(1, h, w)]] * batch,
    } | _text(batch, normal)


def _pixart(batch, h, w, normal) -> dict:
    return _latents(batch, h, w, normal) | _text(batch, normal)


def _hunyuan(batch, h, w, normal) -> dict:
    angles = torch.arange(h * w)[:, None] * torch.arange(1, 9) * 0.05
    return _latents(batch, h, w, normal) | {
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "encoder_hidden_states": normal(batch, TEXT, WIDTH),
        "text_embedding_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_t5": normal(batch, TEXT, WIDTH),
        "text_embedding_mask_t5": torch.ones(batch, TEXT),
        "image_meta_size": torch.ones(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _video(batch, frames, h, w, normal) -> dict:
    video = {"hidden_states": normal(batch, 4, frames, 2 * h, 2 * w)}
    return _latents(batch, h, w, normal) | video | _text(batch, normal)


def _latte(batch, h, w, normal) -> dict:
    return _video(batch, 2, h, w, normal)


def _wan(batch, h, w, normal) -> dict:
    return _video(batch, 3, h, w, normal)


def _ltx(batch, h, w, normal) -> dict:
    return {
        "hidden_states": normal(batch, 2 * h * w, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "num_frames": 2,
        "height": h,
        "width": w,
    } | _text(batch, normal)


def _cogvideox(batch, h, w, normal) -> dict:
    angles = torch.arange(2 * h * w)[:, None] * torch.arange(1, 9) * 0.05
    return {
        "hidden_states": normal(batch, 2, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    } | _text(batch, normal)


def _consisid(batch, h, w, normal) -> dict:
    return _cogvideox(batch, h, w, normal)


def _cogview(batch, h, w, normal) -> dict:
    size = torch.tensor([[16.0 * h, 16.0 * w]]).expand(batch, -1)
    sizes = {"original_size": size, "target_size": size, "crop_coords": 0 * size}
    return _latents(batch, h, w, normal) | _text(batch, normal) | sizes


def _mochi(batch, h, w, normal) -> dict:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[0, 3:] = False
    return _video(batch, 2, h, w, normal) | {"encoder_attention_mask": mask}


def _allegro(batch, h, w, normal) -> dict:
    # Angles of frames, rows and columns, and the places of the tokens on each axis.
    axes = [axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (2, h, w)), indexing="ij")]
    angles = torch.arange(max(2, h, w))[:, None] * torch.arange(1, 5) * 0.05
    angles = angles.to(normal(1).dtype)
    table = [(angles.cos(), angles.sin())] * 3
    places = tuple(axis[None] for axis in axes)
    return _video(batch, 2, h, w, normal) | {"image_rotary_emb": (tuple(table), places)}


def _skyreels(batch, h, w, normal) -> dict:
    return _wan(batch, h, w, normal) | {
        "timestep": torch.tensor([[400.0, 450.0, 500.0]]).expand(batch, -1),
        "enable_diffusion_forcing": True,
    }


def _vace(batch, h, w, normal) -> dict:
    return _wan(batch, h, w, normal) | {
        "control_hidden_states": normal(batch, 8, 3, 2 * h, 2 * w),
    }


def _masked_text(batch, normal) -> dict:
    mask = torch.ones(batch, TEXT)
    mask[0, 3:] = 0
    return _text(batch, normal) | {"encoder_attention_mask": mask}


def _hunyuan_video(batch, h, w, normal) -> dict:
    return (
        _video(batch, 2, h, w, normal)
        | {
            "pooled_projections": normal(batch, WIDTH),
            "guidance": torch.full((batch,), 6000.0),
        }
        | _masked_text(batch, normal)
    )


def _hunyuan_video15(batch, h, w, normal) -> dict:
    second = _masked_text(batch, normal)
    more = {
        # What it computes with has the timestep's precision.
        "timestep": 500 + 0 * normal(batch),
        "encoder_hidden_states_2": second["encoder_hidden_states"],
        "encoder_attention_mask_2": second["encoder_attention_mask"],
        "image_embeds": normal(batch, 3, WIDTH),
    }
    return _video(batch, 2, h, w, normal) | _masked_text(batch, normal) | more


def _hunyuan_image(batch, h, w, normal) -> dict:
    # What it computes with has the timestep's precision.
    timestep = {"timestep": 500 + 0 * normal(batch)}
    return _latents(batch, h, w, normal) | _masked_text(batch, normal) | timestep


def _lumina(batch, h, w, normal) -> dict:
    mask = {"encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long)}
    return _latents(batch, h, w, normal) | _text(batch, normal) | mask


def _zimage(batch, h, w, normal) -> dict:
    """Texts of several lengths, padded to different multiples of 32."""
    return {
        "x": list(normal(batch, 4, 1, 2 * h, 2 * w)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": [normal(65 if index else 33, WIDTH) for index in range(batch)],
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_SQUARE = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4}
_JOINT = {"joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH}
_POOLED = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
_PACKED = {"patch_size": 1, "in_channels": 4, "num_layers": 1}
_FLUX = (
    _PACKED
    | _HEADS
    | {"num_single_layers": 1, "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4)}
)
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_COGVIDEOX = _HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "max_text_seq_length": TEXT,
    "num_layers": 2,
    "use_rotary_positional_embeddings": True,
}
_COGVIEW = (
    _SQUARE
    | _HEADS
    | {"num_layers": 2, "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 4}
    | {"pos_embed_max_size": 16}
)
_HUNYUAN = _HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
}
TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "SD3Transformer2DModel",
            _SQUARE
            | _HEADS
            | _JOINT
            | _POOLED
            | {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
            | {"pos_embed_max_size": 24},
            _sd3,
        ),
        Tiny(
            "AuraFlowTransformer2DModel",
            _SQUARE
            | _HEADS
            | _JOINT
            | {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 1024},
            _auraflow,
        ),
        Tiny(
            "FluxTransformer2DModel",
            _PACKED | _HEADS | _POOLED | {"num_single_layers": 1, "axes_dims_rope": (2, 2, 4)},
            _flux,
            one_map=True,
        ),
        Tiny(
            "ChromaTransformer2DModel",
            _FLUX
            | {"approximator_num_channels": 16, "approximator_hidden_dim": 16}
            | {"approximator_layers": 1},
            _chroma,
            one_map=True,
        ),
        Tiny(
            "BriaTransformer2DModel",
            _FLUX | {"pooled_projection_dim": WIDTH},
            _flux_kin,
            one_map=True,
        ),
        Tiny("LongCatImageTransformer2DModel", _FLUX, _flux_kin, one_map=True),
        Tiny("OvisImageTransformer2DModel", _FLUX | {"out_channels": 4}, _flux_kin, one_map=True),
        Tiny(
            "Flux2Transformer2DModel",
            _PACKED
            | _HEADS
            | {
                "num_single_layers": 1,
                "joint_attention_dim": WIDTH,
                "timestep_guidance_channels": 8,
                "axes_dims_rope": (2, 2, 2, 2),
            },
            _flux2,
            one_map=True,
        ),
        Tiny(
            "QwenImageTransformer2DModel",
            _HEADS
            | {
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "joint_attention_dim": WIDTH,
                "axes_dims_rope": (2, 2, 4),
            },
            _qwen,
            one_map=True,
        ),
        Tiny(
            "PixArtTransformer2DModel",
            _SQUARE
            | _HEADS
            | {
                "out_channels": 8,
                "num_layers": 2,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "use_additional_conditions": False,
                "norm_num_groups": 8,
            },
            _pixart,
        ),
        Tiny(
            "HunyuanDiT2DModel",
            _HEADS
            | {
                "sample_size": 16,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 16,
                "num_layers": 4,
                "cross_attention_dim": WIDTH,
                "cross_attention_dim_t5": WIDTH,
                "pooled_projection_dim": WIDTH,
                "text_len": TEXT,
                "text_len_t5": TEXT,
                "learn_sigma": False,
                "mlp_ratio": 2.0,
            },
            _hunyuan,
            one_map=True,
            # Self- and cross-attention of the one block with a skip connection.
            alone=2,
        ),
        Tiny(
            "LatteTransformer3DModel",
            _SQUARE
            | _HEADS
            | {"num_layers": 1, "cross_attention_dim": 16, "caption_channels": WIDTH}
            | {"video_length": 2, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
            _latte,
        ),
        Tiny(
            "AllegroTransformer3DModel",
            _HEADS
            | {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
            | {"cross_attention_dim": 24, "caption_channels": WIDTH}
            | {"sample_height": 16, "sample_width": 16, "sample_frames": 2},
            _allegro,
            frames=2,
        ),
        Tiny("WanTransformer3DModel", _WAN, _wan, frames=3),
        Tiny("ChronoEditTransformer3DModel", _WAN, _wan, frames=3),
        Tiny(
            "WanVACETransformer3DModel",
            _WAN | {"vace_layers": [0, 1], "vace_in_channels": 8},
            _vace,
            frames=3,
            # Self- and cross-attention of the blocks that make hints.
            alone=4,
        ),
        Tiny("SkyReelsV2Transformer3DModel", _WAN, _skyreels, frames=3),
        Tiny(
            "LTXVideoTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 4,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "num_layers": 2,
            },
            _ltx,
            frames=2,
        ),
        Tiny("CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox, frames=2, one_map=True),
        Tiny(
            "ConsisIDTransformer3DModel",
            _COGVIDEOX | {"is_train_face": False},
            _consisid,
            frames=2,
            one_map=True,
        ),
        Tiny("CogView3PlusTransformer2DModel", _COGVIEW, _cogview),
        Tiny(
            "CogView4Transformer2DModel",
            {**_COGVIEW, "rope_axes_dim": (16, 16)},
            _cogview,
            one_map=True,
        ),
        Tiny(
            "MochiTransformer3DModel",
            _HEADS
            | {"in_channels": 4, "num_layers": 2, "pooled_projection_dim": 16}
            | {"text_embed_dim": WIDTH, "time_embed_dim": 8, "max_sequence_length": TEXT},
            _mochi,
            frames=2,
            image_first=True,
            one_map=True,
        ),
        Tiny(
            "HunyuanVideoTransformer3DModel",
            _HUNYUAN
            | {"num_single_layers": 1, "rope_axes_dim": (2, 2, 4)}
            | {"pooled_projection_dim": WIDTH},
            _hunyuan_video,
            frames=2,
            image_first=True,
            one_map=True,
        ),
        Tiny(
            "HunyuanVideo15Transformer3DModel",
            _HUNYUAN
            | {"patch_size": 2, "rope_axes_dim": (2, 2, 4)}
            | {"text_embed_2_dim": WIDTH, "image_embed_dim": WIDTH},
            _hunyuan_video15,
            frames=2,
            image_first=True,
            one_map=True,
        ),
        Tiny(
            "HunyuanImageTransformer2DModel",
            _HUNYUAN | {"num_single_layers": 1, "patch_size": (2, 2), "rope_axes_dim": (4, 4)},
            _hunyuan_image,
            image_first=True,
            one_map=True,
        ),
        Tiny(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 16,
                "in_channels": 4,
                "hidden_size": 24,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "axes_dim_rope": (4, 4, 4),
                "axes_lens": (16, 32, 32),
                "cap_feat_dim": WIDTH,
            },
            _lumina,
        ),
        Tiny(
            "ZImageTransformer2DModel",
            {
                "in_channels": 4,
                "dim": 24,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": WIDTH,
                "axes_dims": (4, 4, 4),
                "axes_lens": (128, 32, 32),
            },
            _zimage,
            image_first=True,
            # Of the text by itself, which has more tokens than the image here.
            alone=1,
        ),
    )
}

# One of each kind: joint attention whose keys are given back or weighed, and cross-attention with
# positions that were added or rotate.
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
PIXART, WAN = "PixArtTransformer2DModel", "WanTransformer3DModel"
KINDS = (SD3, FLUX, PIXART, WAN)

# The only one that knows square pictures alone, and no text.
DIT = Tiny(
    "DiTTransformer2DModel",
    _SQUARE | _HEADS | {"out_channels": 4, "num_layers": 2, "norm_num_groups": 8},
    lambda batch, h, w, normal: (
        _latents(batch, h, w, normal) | {"class_labels": torch.arange(batch)}
    ),
)


def _controlled(inputs: Callable[..., dict]) -> Callable[..., dict]:
    def given(batch, h, w, normal) -> dict:
        own = inputs(batch, h, w, normal)
        return own | {"controlnet_cond": normal(*own["hidden_states"].shape)}

    return given


def _sd3_tokens(batch, h, w, normal) -> dict:
    """As of Stable Diffusion 3.5: latents that are tokens already, and no text."""
    own = {"hidden_states": normal(batch, h * w, WIDTH), "encoder_hidden_states": None}
    return _controlled(_sd3)(batch, h, w, normal) | own


def _flux_mode(batch, h, w, normal) -> dict:
    mode = {"controlnet_mode": torch.ones(batch, 1, dtype=torch.long)}
    return _controlled(_flux)(batch, h, w, normal) | mode


_SD3_CONTROLNET = _SQUARE | _HEADS | _JOINT | _POOLED | {"num_layers": 2, "pos_embed_max_size": 24}
CONTROLNETS = {
    "SD3ControlNetModel": Tiny("SD3ControlNetModel", _SD3_CONTROLNET, _controlled(_sd3)),
    "SD3ControlNetModel of tokens": Tiny(
        "SD3ControlNetModel",
        _SD3_CONTROLNET | {"joint_attention_dim": None, "use_pos_embed": False},
        _sd3_tokens,
    ),
    "FluxControlNetModel": Tiny(
        "FluxControlNetModel",
        TINY["FluxTransformer2DModel"].config,
        _controlled(_flux),
        one_map=True,
    ),
    "QwenImageControlNetModel": Tiny(
        "QwenImageControlNetModel",
        TINY["QwenImageTransformer2DModel"].config,
        _controlled(_qwen),
        one_map=True,
    ),
    "HunyuanDiT2DControlNetModel": Tiny(
        "HunyuanDiT2DControlNetModel",
        {
            name: value
            for name, value in TINY["HunyuanDiT2DModel"].config.items()
            if name not in ("num_layers", "learn_sigma")
        }
        | {"transformer_num_layers": 4},
        _controlled(_hunyuan),
        one_map=True,
    ),
    "FluxControlNetModel with modes": Tiny(
        "FluxControlNetModel",
        TINY["FluxTransformer2DModel"].config | {"num_mode": 2},
        _flux_mode,
        one_map=True,
    ),
}


def side_by_side(calls: list[Callable[[], Tensor]], times: int) -> list[list[Tensor]]:
    """What each gives, so often, in a thread of its own; all begin at once."""
    start = threading.Barrier(len(calls))
    outputs: list[list[Tensor]] = [[] for _ in calls]

    def run(index: int) -> None:
        start.wait()
        outputs[index] += [calls[index]() for _ in range(times)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(output) == times for output in outputs)
    return outputs


class Attention(TorchFunctionMode):
    """Notes (queries, keys) of every call of fused attention inside a `with`."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.masks: list[Tensor | None] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            given |= kwargs or {}
            self.seen.append((given["query"].shape[-2], given["key"].shape[-2]))
            self.masks.append(given.get("attn_mask"))
        return function(*args, **(kwargs or {}))
