"""What `tomesd.register` needs to know of a UNet."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tomesd.registry import Spec


@dataclass(frozen=True)
class UNet(Spec):
    """How a UNet with diffusers' layout (down_blocks, mid_block, up_blocks) is hooked.

    >>> tomesd.register(UNet(), "my_package.MyUNet")

    transformers: the classes of its spatial transformers, whose `transformer_blocks` (norms, attn1,
        attn2 and ff, as in BasicTransformerBlock) merge, each with the argument, a dict, that it
        passes on to its blocks; "" if it passes on none. The token grid travels in that dict,
        because gradient checkpointing calls a block again, with the same arguments, when other
        forward passes may have come in between. Without it, the last forward pass counts.
    sample, timestep: the model's arguments with the latents and the timestep.
    """

    transformers: Mapping[str, str] = field(
        default_factory=lambda: {
            "Transformer2DModel": "cross_attention_kwargs",
            "TransformerSpatioTemporalModel": "",
        }
    )
    sample: str = "sample"
    timestep: str = "timestep"
