"""Token merging in transformers' VideoMAE; see `tomesd.vit.patch` for the hooks.

Two things differ from the other models of transformers. Its attention takes no mask, so the bias
comes in as an attention implementation that is registered with transformers and chosen only while
the attention runs, and only in the thread that runs it. And its MLP ends in a module that adds the
residual stream itself: the residual that it gets is merged, and nothing has to be unmerged.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tomesd.hooks import Threads
from tomesd.vit.patch import Layer, Seams
from tomesd.vit.transformers import TransformersViTPatch

MODELS = ("VideoMAEModel",)

_NAME = "tomesd_key_bias"


@dataclass(eq=False)
class _Bias:
    """What one thread adds to the keys of the attention that it runs; None while it runs none."""

    value: Tensor | None = None


class _Config:
    """What stands in for an attention's config while its model is patched.

    Whoever asks it gets what config says, but for the attention itself while it runs with a bias:
    that is another implementation, in this thread alone.
    """

    def __init__(self, config: Any):
        self.config = config
        self.threads = Threads(_Bias)

    @property
    def _attn_implementation(self) -> str:
        biased = self.threads.run.value is not None
        return _NAME if biased else self.config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        # Not what copying and pickling ask, before config is there.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.config, name)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> Any:
    """The model's own attention, "eager" or "sdpa", with a bias on its keys."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    stand_in = module.config
    own = ALL_ATTENTION_FUNCTIONS.get_interface(stand_in.config._attn_implementation, eager)
    return own(module, query, key, value, stand_in.threads.run.value, **kwargs)


class _Layer(Layer):
    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return output.unflatten(-1, (-1, self.attention.attention_head_size))

    def weigh_keys(self, attention: Any, args: tuple, kwargs: dict) -> tuple:
        from transformers import AttentionInterface

        bias = self.run.key_bias(self.index, args[0], None)
        if bias is not None:
            AttentionInterface.register(_NAME, _attend)
        attention.config.threads.run.value = None if bias is None else bias[:, None, None]
        return args, kwargs

    def forget_bias(self, attention: Any, args: tuple, output: Any) -> None:
        attention.config.threads.run.value = None

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
        attention: Any = seams.attention
        attention.config = _Config(attention.config)
        self.before(seams.attention, layer.weigh_keys)
        self.after(seams.attention, layer.forget_bias)
        self.before(seams.merge, layer.merge)
        self.before(seams.unmerge, layer.merge_residual)
        self.leave(seams.block, layer.leave)

    def remove(self) -> None:
        super().remove()
        for seams in self.seams:
            attention: Any = seams.attention
            if isinstance(attention.config, _Config):
                attention.config = attention.config.config
