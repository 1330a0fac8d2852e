"""Mochi: joint attention with image tokens first; its processor takes no bias."""

from tomesd.diffusion.dit import Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

register(
    DiT(
        Blocks(
            text=Text("encoder_hidden_states", first=False),
            output=0,
            attention=("attn1",),
            rotary=Rotary("image_rotary_emb"),
            carrier="image_rotary_emb",
        ),
        latent_grid(frames=-3),
        rope="rope",
    ),
    "diffusers.MochiTransformer3DModel",
)
