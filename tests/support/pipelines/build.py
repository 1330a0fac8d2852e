"""Any pipeline of diffusers, built from its signature around a tiny denoiser, and how it is called.

A pipeline's parts and a call's arguments are chosen by their names. What a pipeline wants otherwise
is written down in a table: `Family` for all pipelines of a denoiser, `Case` for one of them.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.support.pipelines.stand_ins import (
    Autoencoder,
    ImageEncoder,
    Processor,
    TextEncoder,
    Tokenizer,
)
from tests.support.tiny_model import WIDTH


class Draw(Enum):
    """Arguments of a call that depend on its size."""

    PICTURE = auto()
    MASK = auto()
    VIDEO = auto()
    MASKS = auto()
    HEIGHT = auto()
    WIDTH = auto()
    FRAMES = auto()


PICTURE, MASK, VIDEO, MASKS = Draw.PICTURE, Draw.MASK, Draw.VIDEO, Draw.MASKS

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One pipeline. parts, call: what it is built from and called with besides; None leaves out.

    config: of its denoiser. sizes: if not its family's. prepare: what is called before it, with it,
        the height and the width.
    """

    parts: Given = field(default_factory=dict)
    call: Given = field(default_factory=dict)
    config: Given = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    prepare: Callable[[Any, int, int], dict[str, Any] | None] | None = None


@dataclass(frozen=True)
class Family:
    """The pipelines of one denoiser.

    denoiser: builds it, given changes to its configuration. cell: pixels along a side of a token.
    channels, space, time: of the autoencoder. sizes: of the pictures, in tokens: one square, one
    odd.
    """

    denoiser: Callable[..., nn.Module]
    pipelines: Mapping[str, Case]
    scheduler: Callable[[], Any] = diffusers.FlowMatchEulerDiscreteScheduler
    channels: int = 4
    space: int = 8
    time: int = 1
    cell: int = 16
    frames: int = 1
    width: int = WIDTH
    vae: Given = field(default_factory=dict)
    parts: Given = field(default_factory=dict)
    call: Given = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((6, 6), (5, 7))


ARGUMENTS: dict[str, Any] = {
    "prompt": "a cat",
    "image": PICTURE,
    "mask_image": MASK,
    "control_image": PICTURE,
    "control_mask": MASK,
    "video": VIDEO,
    "control_video": VIDEO,
    "conditioning_frames": VIDEO,
    "height": Draw.HEIGHT,
    "width": Draw.WIDTH,
    "num_frames": Draw.FRAMES,
    "num_inference_steps": 2,
    "output_type": "latent",
}


def build(name: str, family: Family) -> Any:
    """The pipeline of this name, silent; the same weights each time."""
    torch.manual_seed(0)
    case = family.pipelines[name]
    kind = getattr(diffusers, name)
    # Some clean a prompt with it without asking whether it is installed.
    module = sys.modules[kind.__module__]
    module.ftfy = getattr(module, "ftfy", SimpleNamespace(fix_text=str))
    parts = {}
    given = {**family.parts, **case.parts}
    for part, parameter in inspect.signature(kind.__init__).parameters.items():
        if part == "self":
            continue
        if part in given:
            value = given[part]
            parts[part] = value(family) if callable(value) else value
        elif part in ("transformer", "unet"):
            parts[part] = family.denoiser(**case.config)
        else:
            value = _part(part, str(parameter.annotation), family)
            if value is not None or parameter.default is parameter.empty:
                parts[part] = value
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _part(name: str, annotation: str, family: Family) -> Any:
    if name in ("vae", "movq"):
        return Autoencoder(family.channels, family.space, family.time, **family.vae)
    if name.startswith("text_encoder") and "layers" not in name:
        return TextEncoder(family.width, pooled_first="WithProjection" in annotation)
    if "tokenizer" in name or name in ("processor", "text_processor"):
        return Tokenizer()
    if name in ("feature_extractor", "image_processor"):
        return Processor()
    if name == "image_encoder":
        return ImageEncoder(family.width)
    if name == "scheduler":
        return family.scheduler()
    return {"requires_safety_checker": False, "add_watermarker": False}.get(name)


def call(pipe: Any, name: str, family: Family, size: tuple[int, int], **more: Any) -> Tensor:
    """What the pipeline returns for a size in tokens: one tensor, from one seed."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    chosen = {key: value for key, value in ARGUMENTS.items() if key in accepted}
    chosen |= {**family.call, **family.pipelines[name].call}
    # Some draw from the global state, which is part of what a run is given.
    torch.manual_seed(0)
    np.random.seed(0)
    h, w = (family.cell * side for side in size)
    chosen = {
        key: _drawn(value, h, w, family.frames)
        for key, value in chosen.items()
        if value is not None
    }
    chosen |= more
    if "generator" in accepted:
        chosen["generator"] = torch.Generator().manual_seed(0)
    prepare = family.pipelines[name].prepare
    if prepare is not None:
        chosen |= prepare(pipe, h, w) or {}
    return _tensor(pipe(**chosen))


def draw(h: int, w: int) -> Image.Image:
    """A picture."""
    return Image.linear_gradient("L").rotate(30).convert("RGB").resize((w, h))


def _drawn(value: Any, h: int, w: int, frames: int) -> Any:
    if isinstance(value, list):
        return [_drawn(each, h, w, frames) for each in value]
    if not isinstance(value, Draw):
        return value(h, w) if inspect.isfunction(value) else value
    picture = draw(h, w)
    mask = Image.linear_gradient("L").rotate(90).resize((w, h))
    return {
        Draw.PICTURE: picture,
        Draw.MASK: mask,
        Draw.VIDEO: [picture.rotate(5 * turn) for turn in range(frames)],
        Draw.MASKS: [mask] * frames,
        Draw.HEIGHT: h,
        Draw.WIDTH: w,
        Draw.FRAMES: frames,
    }[value]


def _tensor(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    while isinstance(first, list | tuple):
        if len(first) > 1 and not isinstance(first[0], list | tuple):
            return torch.stack([torch.as_tensor(np.asarray(each)) for each in first])
        first = first[0]
    return torch.as_tensor(np.asarray(first))
