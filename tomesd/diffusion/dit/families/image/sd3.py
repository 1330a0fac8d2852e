"""Stable Diffusion 3 and 3.5: joint attention of two streams, of which the image's merges.

Their attention takes no mask, so keys and values are unmerged for proportional attention.
"""

from tomesd.diffusion.dit import Blocks, DiT, Text, UnmergeKeys, latent_grid
from tomesd.registry import register

_JOINT = Blocks(
    text=Text("encoder_hidden_states"),
    output=1,
    # 3.5 has a second one, of image tokens alone.
    attention=("attn", "attn2"),
    proportional=UnmergeKeys(),
    carrier="joint_attention_kwargs",
)

register(
    DiT(_JOINT, latent_grid(), kwargs="joint_attention_kwargs"), "diffusers.SD3Transformer2DModel"
)

# Those for 3.5 are given latents that are tokens already: the condition tells the grid.
register(
    DiT(
        (
            Blocks(
                text=Text("encoder_hidden_states"),
                output=1,
                attention=("attn", "attn2"),
                proportional=UnmergeKeys(),
                only="JointTransformerBlock",
            ),
            Blocks(proportional=UnmergeKeys(), only="SD3SingleTransformerBlock"),
        ),
        latent_grid(argument="controlnet_cond"),
    ),
    "diffusers.SD3ControlNetModel",
)
