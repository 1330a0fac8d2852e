"""CogView3-Plus, CogView4, GLM-Image: joint attention of image and text, with one norm for both."""

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

register(
    DiT(
        Blocks(
            text=Text("encoder_hidden_states"),
            output=0,
            attention=("attn1",),
            proportional=Bias(3),
        ),
        latent_grid(),
    ),
    "diffusers.CogView3PlusTransformer2DModel",
)

# Their processors take no bias.
register(
    DiT(
        Blocks(
            text=Text("encoder_hidden_states"),
            output=0,
            attention=("attn1",),
            rotary=Rotary("image_rotary_emb"),
            carrier="attention_kwargs",
        ),
        latent_grid(),
        kwargs="attention_kwargs",
    ),
    "diffusers.CogView4Transformer2DModel",
    "diffusers.GlmImageTransformer2DModel",
)
