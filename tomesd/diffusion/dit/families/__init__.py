"""The lines of models in diffusers, one file each; importing them registers their classes."""

from tomesd.diffusion.dit.families import image, refused, video

__all__ = ["image", "refused", "video"]
