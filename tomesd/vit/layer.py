"""The hooks on one block of a Vision Transformer."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomesd.hooks import by_name
from tomesd.vit.forward import Forward, Forwards

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class HookPoints(NamedTuple):
    """The modules of one block that are hooked: see `tomesd.vit.spec.Places`.

    features: those whose outputs are q, k and v, by these names.
    """

    block: nn.Module
    enter: nn.Module
    attention: nn.Module
    merge: nn.Module
    unmerge: nn.Module
    features: dict[str, nn.Module]


# Whose hooks keep no output; transformers' hidden states are unmerged where they are returned.
_KEEP_NOTHING = ("tomesd.", "torch.", "transformers.utils.output_capturing")


@dataclass(eq=False)
class Layer:
    """The hooks of one block; `tomesd.vit.patch` says where they go.

    names: the arguments of its attention in order. mask: the one of them that takes a mask.
    """

    index: int
    forwards: Forwards
    attention: Any
    names: tuple[str, ...]
    mask: str

    @property
    def forward(self) -> Forward:
        return self.forwards.current

    def install(self, patch: Any, points: HookPoints) -> None:
        """Hook the block, whose features and input are hooked already.

        patch: the ViTPatch.
        """
        patch.before(points.attention, self.weigh_keys)
        patch.before(points.merge, self.merge)
        patch.after(points.unmerge, self.unmerge)
        patch.first_after(points.block, self.leave)

    @staticmethod
    def whole_attention(points: HookPoints) -> nn.Module:
        """All of a block's attention, with its output projection."""
        return points.attention

    @staticmethod
    def width(points: HookPoints) -> int:
        """Channels of all heads together."""
        key: Any = points.features["k"]
        return int(key.out_features)

    def arrive(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if isinstance(args[0], torch.fx.Proxy):
            raise TypeError(
                "torch.fx cannot trace a patched Vision Transformer, and a feature extractor that "
                "was traced before does not run its blocks: register a forward hook on the blocks, "
                "whose outputs then have all tokens"
            )
        return (self.forwards.arrive(self.index, args[0]), *args[1:]), kwargs

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.forwards.enter(self.index, args[0])
        if "x_pre" in self.forward.matcher.needs:
            self.record("x_pre", args[0][:, :, None])

    def record(self, name: str, feature: Tensor) -> None:
        """feature: [B, N, H, D]. No gradient flows through the matching."""
        self.forwards.thread.features[name] = feature.detach()

    def merge(self, norm: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x, *rest = args
        if "x" in self.forward.matcher.needs:
            self.record("x", x[:, :, None])
        thread = self.forwards.thread
        self.forward.match(self.index, thread.features, x.shape[1])
        thread.features = {}
        return (self.forward.merge(self.index, x), *rest), kwargs

    def unmerge(self, mlp: nn.Module, args: Args, output: Tensor) -> Tensor:
        step = self.forward.steps[self.index]
        return output if step is None else step.unmerge(output)

    def leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor:
        return self.finish(block, self.forward.merge(self.index, output))

    def finish(self, block: nn.Module, merged: Tensor) -> Tensor:
        """merged: what the block gives. Returns it with all tokens where somebody may keep it."""
        forward, after = self.forward, self.index + 1
        last = after == len(forward.schedule)
        if forward.settings.unmerge and (last or forward.collected or _is_watched(block)):
            merged = forward.all_tokens(after, merged)
        return merged if last else self.forwards.record(merged)

    # Bound methods, since hooks are pickled with their model.
    def record_q(self, module: nn.Module, args: Args, output: Tensor) -> None:
        self.record("q", self.by_heads("q", output))

    def record_k(self, module: nn.Module, args: Args, output: Tensor) -> None:
        self.record("k", self.by_heads("k", output))

    def record_v(self, module: nn.Module, args: Args, output: Tensor) -> None:
        self.record("v", self.by_heads("v", output))

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        """The output of a projection, [B, N, heads · head_dim], as [B, N, heads, head_dim]."""
        # view and not unflatten, of which the older ONNX exporter makes a tensor of fixed size.
        return output.view(*output.shape[:-1], -1, self.attention.head_dim)

    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Add log(size) to the logits of the keys."""
        given = by_name(self.names, args, kwargs)
        bias = self.forward.key_bias(self.index, given[self.names[0]], given.get(self.mask))
        return args[:1], kwargs | {self.mask: None if bias is None else bias[:, None, None]}


def _is_watched(block: nn.Module) -> bool:
    """Whether hooks of others may keep what the block gives, as feature extractors do."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_KEEP_NOTHING)
        for hook in block._forward_hooks.values()
    )
