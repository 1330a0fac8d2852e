"""How much two pictures of the same prompt and seed differ."""

import numpy as np
from PIL import Image


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, 8 bits; infinite for equal pictures.

    >>> psnr(Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 255))
    0.0
    """
    difference = np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    error = np.mean(difference**2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def difference(image: Image.Image, reference: Image.Image, times: int = 4) -> Image.Image:
    """Where two pictures differ: black where they are equal, and the brighter the more they do.

    >>> difference(picture, picture).getextrema()
    ((0, 0), (0, 0), (0, 0))

    times: how much differences are enlarged; by 4, a quarter of full brightness is white.
    """
    first, second = (np.asarray(each.convert("RGB"), dtype=int) for each in (image, reference))
    return Image.fromarray((abs(first - second) * times).clip(0, 255).astype(np.uint8))
