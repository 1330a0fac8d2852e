"""The nodes. They import nothing of ComfyUI: a MODEL brings the methods of its ModelPatcher."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tomesd
from tomesd.diffusion import clones
from tomesd.visualize import draw_groups

_LEVELS = ("preset", "1", "2", "4", "8")
_PRESETS = ("none", "quality", "fast", "paper")
# The functions with which ComfyUI's own node merges.
_BUILT_IN = {"tomesd_m", "tomesd_u"}


class TokenMerging:
    """MODEL → MODEL with merged tokens, and the report."""

    CATEGORY = "model_patches/unet"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        share = {"min": 0.0, "max": 1.0, "step": 0.05}
        ratio = {"default": 0.5, "max": 0.75, "tooltip": "Share of the tokens that merge."}
        since = {"default": 0.2, "tooltip": "Share of the steps that stay unmerged."}
        return {
            "required": {
                "model": ("MODEL",),
                "ratio": ("FLOAT", share | ratio),
                "levels": (
                    _LEVELS,
                    {"tooltip": "Merge at levels at most this much coarser than the finest one."},
                ),
                "since": ("FLOAT", share | since),
                "preset": (_PRESETS, {"tooltip": "docs/options.md says what each sets."}),
                "method": (("tome", "prune"), {"tooltip": "Prune drops tokens: for comparisons."}),
            },
            "optional": {
                "hires": ("BOOLEAN", {"default": False, "tooltip": "This is the hires pass."}),
                "keep_maps": ("BOOLEAN", {"default": False, "tooltip": "For the Token Map node."}),
            },
            "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def patch(
        self,
        model: Any,
        ratio: float,
        levels: str = "preset",
        since: float = 0.2,
        preset: str = "none",
        method: str = "tome",
        hires: bool = False,
        keep_maps: bool = False,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> tuple[Any, str]:
        if extra_pnginfo is not None:
            # The names that the WebUIs have for it.
            extra_pnginfo["token_merging_ratio_hr" if hires else "token_merging_ratio"] = ratio
        clone = _without_built_in(model.clone())
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
        follower.keeps_maps = keep_maps
        return clone, str(tomesd.report(clone))


class TomePatchModel:
    """The inputs and the output of ComfyUI's own node: whole blocks instead of queries only."""

    CATEGORY = "model_patches/unet"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        ratio = {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01}
        return {"required": {"model": ("MODEL",), "ratio": ("FLOAT", ratio)}}

    def patch(self, model: Any, ratio: float) -> tuple[Any]:
        # More than 0.75 of the tokens never merged.
        return (TokenMerging().patch(model, min(ratio, 0.75), since=0.0)[0],)


class TokenMap:
    """Draws the tokens that merged in one step over the finished picture."""

    CATEGORY = "model_patches/unet"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        step = {"default": -1, "min": -1, "max": 10000, "tooltip": "From 0; -1 is the last one."}
        return {"required": {"model": ("MODEL",), "image": ("IMAGE",), "step": ("INT", step)}}

    def draw(self, model: Any, image: Tensor, step: int = -1) -> tuple[Tensor, str]:
        follower = clones.follower_of(model)
        if follower is None or not follower.keeps_maps:
            raise ValueError(
                "model must be of a Token Merging node with keep_maps, and have sampled the image"
            )
        steps = sorted(follower.maps)
        step = steps[-1] if step == -1 and steps else step
        if step not in follower.maps:
            raise ValueError(f"step must be one in which tokens merged, one of {steps}, got {step}")
        found = follower.maps[step]
        groups = found.group[:, found.prefix :].unflatten(1, found.grid).cpu()
        if groups.dim() == 4:
            groups = groups[:, 0]  # The first frame.
        drawn = [
            np.asarray(draw_groups(_picture(each), groups[index % len(groups)]))
            for index, each in enumerate(image)
        ]
        return torch.from_numpy(np.stack(drawn)).float() / 255, str(tomesd.report(model))


def _picture(pixels: Tensor) -> Image.Image:
    """A picture of ComfyUI: [h, w, 3], from 0 to 1."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


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
