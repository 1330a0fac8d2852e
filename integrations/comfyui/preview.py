"""The merged tokens over ComfyUI's preview while it samples.

A sampler calls back after each step, and ComfyUI's callback sends a preview to the page. This calls
it as ever, and then sends the same preview with the tokens that merged in that step.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tomesd.diffusion.clones import Follower
from tomesd.visualize import draw_groups

# ComfyUI's name of wrappers around all of a clone's sampling, and our key among them.
_SAMPLING, _KEY = "outer_sample", "tomesd"


@dataclass(eq=False)
class _Preview:
    """What draws over the previews of one clone."""

    clone: Any
    follower: Follower

    # ComfyUI copies options deeply.
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Preview":
        return self

    def wrap(
        self,
        executor: Any,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any = None,
        callback: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Called by ComfyUI in place of a guider's `outer_sample(noise, latent_image, …)`."""
        find = import_module("latent_preview").get_previewer
        previewer = find(self.clone.load_device, self.clone.model.latent_format)

        def after_step(step: int, x0: Any, x: Any, total: int) -> None:
            if callback is not None:
                callback(step, x0, x, total)
            found = self.follower.maps.get(step)
            if previewer is not None and found is not None:
                preview = previewer.decode_latent_to_preview_image("JPEG", x0)
                bar = import_module("comfy.utils").ProgressBar(total)
                bar.update_absolute(step + 1, total, _drawn(preview, found))

        return executor(
            noise, latent_image, sampler, sigmas, denoise_mask, after_step, *args, **kwargs
        )


def _drawn(preview: Any, found: Any) -> Any:
    """A preview (format, picture, longest side), as large as it is shown, with merged tokens."""
    kind, picture, longest = preview
    scale = max(1, longest // max(picture.size))
    picture = picture.resize([scale * side for side in picture.size])
    groups = found.groups[0]  # Of the first image, and for a video the first frame.
    return kind, draw_groups(picture, groups if groups.dim() == 2 else groups[0]), longest


def follow_preview(clone: Any, follower: Follower) -> None:
    """Draw over the previews of a clone with this follower."""
    clone.add_wrapper_with_key(_SAMPLING, _KEY, _Preview(clone, follower).wrap)


def forget_preview(clone: Any) -> None:
    """Leave the previews of a clone as they are."""
    if hasattr(clone, "remove_wrappers_with_key"):
        clone.remove_wrappers_with_key(_SAMPLING, _KEY)
