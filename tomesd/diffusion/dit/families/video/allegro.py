"""Allegro: self-attention of a video's tokens, with rotary tables per axis."""

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, latent_grid
from tomesd.registry import register

register(
    DiT(
        Blocks(
            attention=("attn1",),
            proportional=Bias(3),
            # The angles of each axis, then the position of each token on it.
            rotary=Rotary("image_rotary_emb", dim=1, table=1),
        ),
        latent_grid(frames=-3),
    ),
    "diffusers.AllegroTransformer3DModel",
)
