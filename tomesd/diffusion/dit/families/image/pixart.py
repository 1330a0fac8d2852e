"""PixArt-α and Σ, and DiT: self-attention of image tokens; text only in cross-attention."""

from tomesd.diffusion.dit import Bias, Blocks, DiT, latent_grid
from tomesd.registry import register

register(
    DiT(
        Blocks(attention=("attn1",), proportional=Bias(3), carrier="cross_attention_kwargs"),
        latent_grid(),
        kwargs="cross_attention_kwargs",
    ),
    "diffusers.PixArtTransformer2DModel",
    "diffusers.DiTTransformer2DModel",
)
