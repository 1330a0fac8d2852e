"""Hunyuan-DiT, and HunyuanImage: joint attention with image tokens first and masked text."""

from tomesd.diffusion.dit import Bias, Blocks, DiT, Rotary, Text, latent_grid
from tomesd.registry import register

# The blocks of Hunyuan-DiT's second half begin with a projection of the stream and its long skip
# connection: what they give is no residual of what they get.
register(
    DiT(
        Blocks(
            "blocks",
            attention=("attn1",),
            proportional=Bias(3),
            rotary=Rotary("image_rotary_emb"),
            unless="skip_linear",
        ),
        latent_grid(),
    ),
    "diffusers.HunyuanDiT2DModel",
    "diffusers.HunyuanDiT2DControlNetModel",
)


def _blocks(name: str) -> Blocks:
    return Blocks(
        name,
        text=Text("encoder_hidden_states", first=False),
        output=0,
        proportional=Bias(4),
        rotary=Rotary("image_rotary_emb"),
        mask="attention_mask",
        carrier="image_rotary_emb",
    )


# A refiner's latents have one dimension more.
register(
    DiT(
        (_blocks("transformer_blocks"), _blocks("single_transformer_blocks")),
        latent_grid(frames=-3),
        rope="rope",
    ),
    "diffusers.HunyuanImageTransformer2DModel",
)
