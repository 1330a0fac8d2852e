"""EasyAnimate: joint attention of video and text, with rotary positions."""

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

register(
    DiT(
        Blocks(
            text=Text("encoder_hidden_states"),
            output=0,
            attention=("attn1",),
            proportional=Bias(4),
            rotary=Rotary("image_rotary_emb"),
            carrier="image_rotary_emb",
        ),
        latent_grid(frames=-3),
        rope="rope_embedding",
    ),
    "diffusers.EasyAnimateTransformer3DModel",
)
