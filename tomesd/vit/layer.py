"""The hooks on one block of a Vision Transformer."""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
        return self.finish(self.forward.merge(self.index, output))

    def finish(self, merged: Tensor) -> Tensor:
        forward = self.forward
        last = self.index == len(forward.schedule) - 1
        if last:
            return forward.maps[-1].unmerge(merged) if forward.settings.unmerge else merged
        return self.forwards.record(merged)

    # Bound methods, since hooks are pickled with their model.
    def record_q(self, module: nn.Module, args: Args, output: Tensor) -> None:
        self.record("q", self.by_heads("q", output))

    def record_k(self, module: nn.Module, args: Args, output: Tensor) -> None:
        self.record("k", self.by_heads("k", output))

    def record_v(self, module: nn.Module, args: Args, output: Tensor) -> None:
        self.record("v", self.by_heads("v", output))

    def by_heads(self, name: str, output: Tensor) -> Tensor:
        """The output of a projection, [B, N, heads · head_dim], as [B, N, heads, head_dim]."""
        by_heads: Tensor = output.unflatten(-1, (-1, self.attention.head_dim))
        return by_heads

    def weigh_keys(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Add log(size) to the logits of the keys."""
        given = by_name(self.names, args, kwargs)
        bias = self.forward.key_bias(self.index, given[self.names[0]], given.get(self.mask))
        return args[:1], kwargs | {self.mask: None if bias is None else bias[:, None, None]}
