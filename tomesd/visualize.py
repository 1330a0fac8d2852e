"""Pictures of merged tokens (ToMe, Figures 4 and 6). Needs Pillow and NumPy.

>>> from tomesd import visualize
>>> with tomesd.trace(vit) as traced:
...     output = vit(images)
>>> visualize.draw_groups(picture, traced[-1].patches[0]).save("groups.png")
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Turns by the golden ratio spread hues evenly, however many groups there are.
_GOLDEN = 0.618034


def draw_groups(image: Image.Image, patches: Tensor) -> Image.Image:
    """Draw merged patches over an image: every group has one color.

    >>> draw_groups(picture, traced[-1].patches[0])

    A group is filled with the average color of its region, and each of its parts has a border in
    the group's own color. Patches with the same fill and border are one token, even where they do
    not touch. Dropped patches are black.

    image: what the model saw, at any size: the part that its patches covered. patches: int64
        [h, w], from `TokenGroups.patches`, for one sample; for audio, rows are frequencies.
    Returns an RGB image of the same size.
    Raises ValueError unless patches have two dimensions and are no more than the image's pixels.
    Source: ToMe, Figure 4.
    """
    if patches.dim() != 2:
        raise ValueError(f"patches must be [h, w] for a picture, got {list(patches.shape)}")
    return draw_frames([image], patches[None])[0]


def draw_frames(frames: Sequence[Image.Image], patches: Tensor) -> list[Image.Image]:
    """`draw_groups` over the frames of a video; a group may span several frames.

    >>> pictures = draw_frames(frames, traced[-1].patches[0])

    A group has the same border and fill in all frames: the fill is the average color of its region
    in all of them. So what keeps its colors over time is one token.

    frames: all of one size. patches: int64 [t, h, w] for one sample, where each of the t may cover
        several frames (VideoMAE: 2). Returns one RGB image per frame.
    Raises ValueError unless patches have three dimensions and frames are all of one size, with at
    least as many frames and pixels as patches.
    Source: ToMe, Figure 6.
    """
    if patches.dim() != 3:
        raise ValueError(f"patches must be [t, h, w] for a video, got {list(patches.shape)}")
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"frames must all be of one size, got {sorted(sizes)}")
    pixels = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    if any(p > n for p, n in zip(patches.shape, pixels.shape, strict=False)):
        raise ValueError(
            f"patches must be no more than the pixels {list(pixels.shape[:3])} (frames, height, "
            f"width), got {list(patches.shape)}"
        )
    where = [np.arange(n) * p // n for n, p in zip(pixels.shape, patches.shape, strict=False)]
    # Group 0 is what was dropped.
    group = patches.cpu().numpy()[np.ix_(*where)] + 1
    size = np.bincount(group.ravel())
    sums = [np.bincount(group.ravel(), channel.ravel()) for channel in np.moveaxis(pixels, -1, 0)]
    inner = np.stack(sums, -1) / np.maximum(size, 1)[:, None]
    inner[0] = 0
    width = max(
        1, min(pixels.shape[1] // patches.shape[1], pixels.shape[2] // patches.shape[2]) // 10
    )
    painted = np.where(_at_border(group, width)[..., None], _colors(len(size))[group], inner[group])
    return [Image.fromarray(frame) for frame in painted.round().astype(np.uint8)]


def _at_border(group: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Which pixels [t, h, w] are so near to the edge of their group's region in their frame."""
    near = np.zeros(group.shape, bool)
    for axis in (1, 2):
        for shift in range(1, width + 1):
            ahead = [slice(None)] * 3
            behind = [slice(None)] * 3
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            differs = group[tuple(ahead)] != group[tuple(behind)]
            near[tuple(ahead)] |= differs
            near[tuple(behind)] |= differs
    return near & (group > 0)


def _colors(count: int) -> NDArray[np.float64]:
    """A border colour for each group: neighbouring numbers get very different hues."""
    hues = [(i * _GOLDEN) % 1 for i in range(count)]
    values = [0.95 if i % 3 else 0.6 for i in range(count)]
    rgb = [colorsys.hsv_to_rgb(h, 0.85, v) for h, v in zip(hues, values, strict=True)]
    return 255 * np.array(rgb)
