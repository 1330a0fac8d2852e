"""The transformers of ComfyUI and Forge: Flux, Chroma, Qwen-Image, SD3 and Wan.

Their blocks are hooked as those of diffusers, so that all of a clone's own patches around blocks
(`patches_replace["dit"]`), between them and for ControlNets see every token. Each position table is
of all samples, so each sample has a token map of its own. What is the same in all of them:

- Some blocks add in place, and which do differs between releases.
- `transformer_options` travels through every call: attention asks it for a replacement, and nodes
  put functions there that see the tokens inside of a block. Such a block does not merge.

Forge's attention takes no bias. Checked against ComfyUI a125cd8 and fe25114 and Stable Diffusion
WebUI Forge dfdcbab.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tomesd.diffusion.block import Grid
from tomesd.diffusion.dit import Blocks, DiT, Override, Rotary, Text
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.registry import refuse, register

# Functions of nodes that see a block's tokens from inside of it.
_INSIDE = ("attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch")


def _patched_inside(given: dict[str, Any], settings: DiffusionSettings) -> str:
    patches = (given.get("transformer_options") or {}).get("patches", {})
    found = [name for name in _INSIDE if patches.get(name)]
    return f"patches of others see its tokens: {', '.join(found)}" if found else ""


def _grid(latents: Any, patch: tuple[int, int, int]) -> Grid:
    """Of latents [B, C, H, W] or [B, C, F, H, W], padded to whole patches."""
    h, w = (-(-size // side) for size, side in zip(latents.shape[-2:], patch[1:], strict=True))
    return (-(-latents.shape[2] // patch[0]) if latents.dim() == 5 else 1), h, w


def _images(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """The image, and the reference images after it."""
    side = getattr(model, "patch_size", 2)  # The Flux of Forge knows no other.
    patch = 1, side, side
    return tuple(_grid(each, patch) for each in (given["x"], *(given.get("ref_latents") or ())))


def _video(model: Any, given: dict[str, Any]) -> tuple[Grid, ...]:
    """The video, with frames that other nodes put after it, and a reference image before it."""
    frames, h, w = _grid(given["x"], model.patch_size)
    after, before = given.get("time_dim_concat"), given.get("reference_latent")
    if after is not None:
        frames += _grid(after, model.patch_size)[0]
    if before is None or model.ref_conv is None:
        return ((frames, h, w),)
    return _grid(before, model.patch_size), (frames, h, w)


def _of_class(*names: str) -> Callable[[Any], str]:
    """Classes that inherit from these may give their blocks other tokens."""

    def why_not(model: Any) -> str:
        known = type(model).__name__ in names
        return "" if known else f"known are {', '.join(names)}, not what inherits from them"

    return why_not


def _why_not_video(given: dict[str, Any], settings: DiffusionSettings) -> str:
    """A timestep of each frame is for as many tokens in a row as a frame has."""
    timesteps = given["e"]
    if timesteps.dim() == 4 and timesteps.shape[1] > 1 and settings.across_frames:
        return "its frames have timesteps of their own, and across_frames=True merges across them"
    return _patched_inside(given, settings)


_DOUBLE = Blocks(
    "double_blocks",
    tokens="img",
    text=Text("txt"),
    output=0,
    attention=(),
    proportional=Override(),
    rotary=Rotary("pe", dim=-1),
    mask="attn_mask",
    adds_in_place=True,
    why_not=_patched_inside,
)
_SINGLE = replace(_DOUBLE, name="single_blocks", tokens="x", text=Text(), output=None)
_JOINT = Blocks(
    "joint_blocks",
    tokens="x",
    text=Text("context"),
    output=1,
    attention=(),
    proportional=Override(),
    adds_in_place=True,
    names=("context", "x"),
    why_not=_patched_inside,
)

register(DiT((_DOUBLE, _SINGLE), _images, why_not=_of_class("Flux")), "comfy.ldm.Flux")
register(DiT((_DOUBLE, _SINGLE), _images, why_not=_of_class("Chroma")), "comfy.ldm.Chroma")
register(
    DiT(
        Blocks(
            tokens="hidden_states",
            text=Text("encoder_hidden_states"),
            output=1,
            attention=(),
            proportional=Override(),
            rotary=Rotary("image_rotary_emb", dim=-1),
            # Reference images may have a timestep of their own, 0.
            first_image="timestep_zero_index",
            adds_in_place=True,
            why_not=_patched_inside,
        ),
        _images,
        why_not=_of_class("QwenImageTransformer2DModel"),
    ),
    "comfy.ldm.QwenImageTransformer2DModel",
)
register(DiT(_JOINT, _images, timestep="timesteps"), "comfy.ldm.OpenAISignatureMMDITWrapper")

_WAN = Blocks(
    "blocks",
    tokens="x",
    # Text is in its cross-attention, which asks the same options.
    attention=("self_attn",),
    proportional=Override(),
    rotary=Rotary("freqs", dim=-1),
    per_token=(("e", 1),),
    adds_in_place=True,
    why_not=_why_not_video,
)
register(
    DiT(_WAN, _video, why_not=_of_class("WanModel", "CameraWanModel", "AnimateWanModel")),
    "comfy.ldm.WanModel",
)
register(
    DiT(
        _WAN,
        _video,
        unmerged=(("vace_blocks", "they hand on what they make of every token"),),
        why_not=_of_class("VaceWanModel"),
    ),
    "comfy.ldm.VaceWanModel",
)
refuse("each of its tokens attends to the sound of its own frame", "comfy.ldm.HumoWanModel")
refuse(
    "its tokens are of several resolutions, not of one grid: earlier frames are packed",
    "comfy.ldm.WanModel_S2V",
)


def _of_forge(blocks: Blocks) -> Blocks:
    """The same blocks, without options or masks."""
    return replace(blocks, proportional=None, mask="")


register(
    DiT((_of_forge(_DOUBLE), _of_forge(_SINGLE)), _images),
    "backend.IntegratedFluxTransformer2DModel",
)
register(DiT(_of_forge(_JOINT), _images, timestep="t"), "backend.MMDiTX")
