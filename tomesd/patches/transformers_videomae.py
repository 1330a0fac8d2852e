"""Token merging in transformers' VideoMAE; see `tomesd.patches.vit` for the hooks.

Two things differ from the other models of transformers. Its attention takes no mask, so the bias
comes in as an attention implementation that is registered with transformers and chosen only while
the attention runs. And its MLP ends in a module that adds the residual stream itself: the residual
that it gets is merged, and nothing has to be unmerged.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tomesd.patches.transformers_vit import TransformersViTPatch
from tomesd.patches.vit import Layer, Seams

MODELS = ("VideoMAEModel",)

_NAME = "tomesd_key_bias"


@dataclass(eq=False)
class _BiasedConfig:
    """What stands in for an attention's config while it runs."""

    config: Any
    bias: Tensor
    _attn_implementation: str = _NAME


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> Any:
    """The model's own attention, "eager" or "sdpa", with a bias on its keys."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    stand_in = module.config
    own = ALL_ATTENTION_FUNCTIONS.get_interface(stand_in.config._attn_implementation, eager)
    return own(module, query, key, value, stand_in.bias, **kwargs)


def _restore(attention: Any) -> None:
    if isinstance(attention.config, _BiasedConfig):
        attention.config = attention.config.config


class _Layer(Layer):
    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return output.unflatten(-1, (-1, self.attention.attention_head_size))

    def weigh_keys(self, attention: Any, args: tuple, kwargs: dict) -> tuple:
        from transformers import AttentionInterface

        _restore(attention)  # The last run may have been interrupted.
        bias = self.run.key_bias(self.index, args[0], None)
        if bias is not None:
            AttentionInterface.register(_NAME, _attend)
            attention.config = _BiasedConfig(attention.config, bias[:, None, None])
        return args, kwargs

    def restore(self, attention: Any, args: tuple, output: Any) -> None:
        _restore(attention)

    def merge_residual(self, output: nn.Module, args: tuple, kwargs: dict) -> tuple:
        hidden, residual = args
        return (hidden, self.run.merge(self.index, residual)), kwargs

    def leave(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.finish(output)


class VideoMAEPatch(TransformersViTPatch):
    layer_type = _Layer

    def block_seams(self, block: Any) -> Seams:
        attention = block.attention.attention
        features = {"q": attention.query, "k": attention.key, "v": attention.value}
        return Seams(
            block,
            block.layernorm_before,
            attention,
            block.layernorm_after,
            block.output,
            features,
            attention.all_head_size,
        )

    def whole_attention(self, seams: Any) -> nn.Module:
        return seams.block.attention

    def install_block(self, seams: Seams, layer: Any) -> None:
        self.before(seams.attention, layer.weigh_keys)
        self.after(seams.attention, layer.restore)
        self.before(seams.merge, layer.merge)
        self.before(seams.unmerge, layer.merge_residual)
        self.leave(seams.block, layer.leave)

    def remove(self) -> None:
        super().remove()
        # One that was interrupted has not called its last hook.
        for seams in self.seams:
            _restore(seams.attention)
