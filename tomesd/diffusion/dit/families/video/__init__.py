"""Transformers that make videos."""

from tomesd.diffusion.dit.families.video import (
    allegro,
    cogvideox,
    hunyuan_video,
    latte,
    ltx_video,
    mochi,
    wan,
)

__all__ = ["allegro", "cogvideox", "hunyuan_video", "latte", "ltx_video", "mochi", "wan"]
