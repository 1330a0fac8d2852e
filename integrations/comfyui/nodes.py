"""The nodes. A MODEL brings the methods of its ModelPatcher; only previews import ComfyUI."""

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tomesd
from tomesd.diffusion import clones
from tomesd.hooks import BlockTrace
from tomesd.visualize import draw_frames, draw_groups

from .preview import follow_preview, forget_preview

# The functions with which ComfyUI's own node merges.
_BUILT_IN = {"tomesd_m", "tomesd_u"}


class _Node:
    """What ComfyUI reads from every node; INPUTS is what INPUT_TYPES gives it."""

    CATEGORY = "model_patches"
    FUNCTION = "run"
    INPUTS: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802
        return cls.INPUTS


def _share(default: float, most: float, tooltip: str, step: float = 0.05) -> tuple[str, Any]:
    limits = {"default": default, "min": 0.0, "max": most, "step": step}
    return "FLOAT", limits | {"tooltip": tooltip}


def _choice(*options: str, tooltip: str) -> tuple[tuple[str, ...], Any]:
    return options, {"tooltip": tooltip}


def _switch(tooltip: str) -> tuple[str, Any]:
    return "BOOLEAN", {"default": False, "tooltip": tooltip}


class TokenMerging(_Node):
    """MODEL → MODEL with merged tokens, and the report."""

    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    INPUTS: ClassVar = {
        "required": {
            "model": ("MODEL",),
            "ratio": _share(0.5, 0.75, "Share of the tokens that merge."),
            "levels": _choice(
                *("preset", "1", "2", "4", "8"),
                tooltip="Merge at levels at most this much coarser than the finest one.",
            ),
            "since": _share(0.2, 1.0, "Share of the steps that stay unmerged."),
            "preset": _choice(
                *("none", "quality", "fast", "paper"),
                tooltip="docs/options.md says what each sets.",
            ),
            "method": _choice("tome", "prune", tooltip="Prune drops tokens: for comparisons."),
        },
        "optional": {
            "hires": _switch("This is the hires pass."),
            "keep_maps": _switch("For the Token Map node."),
            "preview": _switch("Draw the merged tokens over the preview while sampling."),
        },
        "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"},
    }

    def run(
        self,
        model: Any,
        ratio: float,
        levels: str = "preset",
        since: float = 0.2,
        preset: str = "none",
        method: str = "tome",
        hires: bool = False,
        keep_maps: bool = False,
        preview: bool = False,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> tuple[Any, str]:
        if extra_pnginfo is not None:
            # The names that the WebUIs have for it.
            extra_pnginfo["token_merging_ratio_hr" if hires else "token_merging_ratio"] = ratio
        clone = _without_built_in(model.clone())
        forget_preview(clone)
        if ratio == 0 or since >= 1:
            return tomesd.remove_patch(clone), "nothing merges: ratio is 0, or since is 1"
        options: dict[str, Any] = {"method": method}
        if levels != "preset":
            options["max_downsample"] = int(levels)
        tomesd.apply_patch(
            clone,
            tomesd.RatioSchedule.last(ratio, since) if since else ratio,
            preset=None if preset == "none" else preset,
            **options,
        )
        follower = clones.follower_of(clone)
        assert follower is not None
        follower.keeps_maps = keep_maps or preview
        if preview:
            follow_preview(clone, follower)
        return clone, str(tomesd.report(clone))


class TomePatchModel(_Node):
    """The inputs and the output of ComfyUI's own node: whole blocks instead of queries only."""

    RETURN_TYPES = ("MODEL",)
    INPUTS: ClassVar = {
        "required": {
            "model": ("MODEL",),
            "ratio": _share(0.3, 1.0, "Share of the tokens that merge.", step=0.01),
        }
    }

    def run(self, model: Any, ratio: float) -> tuple[Any]:
        # More than 0.75 of the tokens never merged.
        return (TokenMerging().run(model, min(ratio, 0.75), since=0.0)[0],)


class TokenMap(_Node):
    """Draws the tokens that merged in one step over the finished picture or video."""

    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")
    INPUTS: ClassVar = {
        "required": {
            "model": ("MODEL",),
            "image": ("IMAGE",),
            "step": ("INT", {"default": -1, "min": -1, "max": 10000, "tooltip": "-1: the last."}),
        }
    }

    def run(self, model: Any, image: Tensor, step: int = -1) -> tuple[Tensor, str]:
        follower = clones.follower_of(model)
        if follower is None or not follower.keeps_maps:
            raise ValueError(
                "model must be of a Token Merging node with keep_maps, and have sampled the image"
            )
        steps = sorted(follower.maps)
        step = steps[-1] if step == -1 and steps else step
        if step not in follower.maps:
            raise ValueError(f"step must be one in which tokens merged, one of {steps}, got {step}")
        drawn = [np.asarray(each) for each in _drawn(image, follower.maps[step])]
        return torch.from_numpy(np.stack(drawn)).float() / 255, str(tomesd.report(model))


def _drawn(image: Tensor, found: BlockTrace) -> list[Image.Image]:
    """The pictures [count, h, w, 3] of ComfyUI, from 0 to 1, with their merged tokens."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    pictures = [Image.fromarray(each) for each in pixels]
    groups = found.groups.cpu()
    if groups.dim() == 3:
        return [draw_groups(each, groups[i % len(groups)]) for i, each in enumerate(pictures)]
    return draw_frames(pictures, groups[0])


def _without_built_in(clone: Any) -> Any:
    """The clone without what ComfyUI's own node has added to it, in old workflows."""
    patches = clone.model_options["transformer_options"].get("patches", {})
    for name in ("attn1_patch", "attn1_output_patch"):
        kept = [
            each for each in patches.pop(name, []) if getattr(each, "__name__", "") not in _BUILT_IN
        ]
        if kept:  # An empty list is a patch to ComfyUI.
            patches[name] = kept
    return clone
