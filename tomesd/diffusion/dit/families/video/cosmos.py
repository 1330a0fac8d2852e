"""Cosmos: self-attention with rotary positions; text only in cross-attention.

Positions that are learned are added to the tokens in every block, and so is what a ControlNet made:
to every token.
"""

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, latent_grid
from tomesd.registry import refuse, register

register(
    DiT(
        Blocks(
            attention=("attn1",),
            proportional=Bias(4),
            rotary=Rotary("image_rotary_emb"),
            # If each frame has its own timestep.
            per_token=(("embedded_timestep", 1), ("temb", 1)),
            adds_first="extra_pos_emb",
            adds_last="controlnet_residual",
            carrier="image_rotary_emb",
        ),
        latent_grid(frames=-3),
        rope="rope",
    ),
    "diffusers.CosmosTransformer3DModel",
)

refuse(
    "its blocks hand on a projection of every token, not only what they add to it",
    "diffusers.CosmosControlNetModel",
)
refuse(
    "its images, videos, sounds and actions are one sequence without a batch, whose order only its "
    "data tell",
    "diffusers.Cosmos3OmniTransformer",
)
