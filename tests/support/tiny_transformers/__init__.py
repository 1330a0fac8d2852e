"""Diffusers' own diffusion transformers, tiny and with random weights, and how each is called.

Sizes are token grids (h, w), also where a model takes latents or packed tokens.
"""

from tests.support.tiny_model import TEXT_TOKENS
from tests.support.tiny_transformers.controlnets import CONTROLNETS
from tests.support.tiny_transformers.images import DIT, IMAGES, ids
from tests.support.tiny_transformers.model import TinyTransformer
from tests.support.tiny_transformers.newer_images import NEWER_IMAGES
from tests.support.tiny_transformers.newer_videos import NEWER_VIDEOS
from tests.support.tiny_transformers.single_streams import SINGLE_STREAMS
from tests.support.tiny_transformers.videos import VIDEOS

TINY = IMAGES | NEWER_IMAGES | SINGLE_STREAMS | VIDEOS | NEWER_VIDEOS

# One of each kind: joint attention whose keys are unmerged or weighed, and cross-attention with
# positions that were added or rotate.
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
PIXART, WAN = "PixArtTransformer2DModel", "WanTransformer3DModel"
KINDS = (SD3, FLUX, PIXART, WAN)

__all__ = [
    "CONTROLNETS",
    "DIT",
    "FLUX",
    "IMAGES",
    "KINDS",
    "PIXART",
    "SD3",
    "TEXT_TOKENS",
    "TINY",
    "VIDEOS",
    "WAN",
    "TinyTransformer",
    "ids",
]
