"""What `tomesd.register` needs to know of a UNet."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tomesd.diffusion.conflicts import fused_projections_error
from tomesd.diffusion.settings import DiffusionSettings
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

    A subclass says how another layout differs, as `tomesd.diffusion.unet.ldm.LDMUNet` does.
    """

    transformers: Mapping[str, str] = field(
        default_factory=lambda: {
            "Transformer2DModel": "cross_attention_kwargs",
            "TransformerSpatioTemporalModel": "",
        }
    )
    sample: str = "sample"
    timestep: str = "timestep"

    def stages(self, model: Any) -> Iterator[tuple[str, int, list[Any]]]:
        """The name, downsampling factor and attention modules of each stage."""
        factors = []
        factor = 1
        for i, block in enumerate(model.down_blocks):
            factors.append(factor)
            yield f"down_blocks.{i}", factor, _attentions(block)
            factor *= 2 if getattr(block, "downsamplers", None) else 1
        yield "mid_block", factor, _attentions(model.mid_block)
        for i, block in enumerate(getattr(model, "up_blocks", [])):
            yield f"up_blocks.{i}", factors[-1 - i], _attentions(block)

    def check_block(self, block: Any, settings: DiffusionSettings) -> None:
        """Raise ValueError for settings that a transformer block cannot follow."""
        name = "merge_block" if settings.merge_block else "merge_mlp"
        if getattr(settings, name) and block._chunk_size is not None:
            raise ValueError(
                f"{name} must be False with feed-forward chunking, got True: "
                "set_chunk_feed_forward(None) on the blocks, or leave the MLP unmerged"
            )
        if settings.merge_attn and not settings.merge_queries and block.attn1.fused_projections:
            raise fused_projections_error("merge_queries", False)

    def has_self_attention(self, block: Any) -> bool:
        return not block.only_cross_attention

    def width(self, transformer: Any) -> int:
        """The channels of a transformer's tokens."""
        return int(transformer.inner_dim)

    def sample_size(self, model: Any) -> tuple[int, int]:
        """The latents' size for which the model was made; zeros if it does not say."""
        # A ControlNet's config does not.
        size = model.config.get("sample_size") or 0
        return (size, size) if isinstance(size, int) else tuple(size)


def _attentions(block: Any) -> list[Any]:
    return list(getattr(block, "attentions", []))
