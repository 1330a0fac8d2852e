"""AuraFlow: joint attention of two streams, then of a single one; its attention takes no mask."""

from tomesd.diffusion.dit import Blocks, DiT, Text, UnmergeKeys, latent_grid
from tomesd.registry import register

register(
    DiT(
        (
            Blocks(
                "joint_transformer_blocks",
                text=Text("encoder_hidden_states"),
                output=1,
                proportional=UnmergeKeys(),
            ),
            Blocks("single_transformer_blocks", text=Text(), proportional=UnmergeKeys()),
        ),
        latent_grid(),
    ),
    "diffusers.AuraFlowTransformer2DModel",
)
