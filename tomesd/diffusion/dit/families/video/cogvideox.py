"""CogVideoX and ConsisID: joint attention of video and text, after one norm for both."""

from dataclasses import replace

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

_JOINT = Blocks(
    text=Text("encoder_hidden_states"),
    output=0,
    attention=("attn1",),
    proportional=Bias(3),
    rotary=Rotary("image_rotary_emb"),
)

register(
    DiT(
        replace(_JOINT, carrier="attention_kwargs"),
        latent_grid(frames=1),
        kwargs="attention_kwargs",
    ),
    "diffusers.CogVideoXTransformer3DModel",
)
register(DiT(_JOINT, latent_grid(frames=1)), "diffusers.ConsisIDTransformer3DModel")
