"""PixArt-α and Σ, and DiT: self-attention of image tokens; text only in cross-attention.

PRX attends to both at once, and its processor takes no bias.
"""

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
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
register(
    DiT(
        Blocks(
            "blocks",
            text=Text("encoder_hidden_states"),
            attention=("attention",),
            rotary=Rotary("image_rotary_emb", dim=2),
        ),
        latent_grid(),
    ),
    "diffusers.PRXTransformer2DModel",
)
