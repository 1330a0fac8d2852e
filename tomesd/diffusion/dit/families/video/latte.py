"""Latte: its spatial blocks merge, one frame at a time; its temporal blocks do not.

So across_frames changes nothing.
"""

from tomesd.diffusion.dit import Bias, Blocks, DiT, latent_grid
from tomesd.registry import register

register(
    DiT(Blocks(attention=("attn1",), proportional=Bias(3)), latent_grid()),
    "diffusers.LatteTransformer3DModel",
)
