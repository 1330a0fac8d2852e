"""The hooks on one block of a Vision Transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomesd.hooks import argument_names, by_name
from tomesd.vit.forward import Forward
from tomesd.vit.forwards import Forwards
from tomesd.vit.rotary import Rotary

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

    names: the arguments of its attention in order. mask: the one of them that takes a mask. rotary:
    how it gets the angles of its tokens, if it rotates queries and keys.
    """

    index: int
    forwards: Forwards
    attention: Any
    names: tuple[str, ...]
    mask: str
    rotary: Rotary | None = None

    @property
    def forward(self) -> Forward:
        return self.forwards.current

    @property
    def idle(self) -> bool:
        """Whether the block merges within itself, but nothing now."""
        return self.forward.settings.within_blocks and self.forward.maps[self.index] is None

    def install(self, patch: Any, points: HookPoints) -> None:
        """Hook the block.

        patch: the ViTPatch.
        """
        if self.forward.settings.within_blocks:
            self.install_within(patch, points)
            return
        patch.before(points.block, self.arrive)
        patch.before(points.enter, self.enter)
        for name in self.forward.matcher.needs:
            if name in points.features:
                patch.after(points.features[name], getattr(self, f"record_{name}"))
        self.install_attention(patch, points)
        self.install_merging(patch, points)

    def install_within(self, patch: Any, points: HookPoints) -> None:
        self.block_names = argument_names(points.block)
        patch.before(points.block, self.merge_within)
        patch.before(points.enter, self.enter_within)
        self.install_attention(patch, points)
        patch.first_after(points.block, self.unmerge_within)

    def install_attention(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.attention, self.weigh_keys)

    def install_merging(self, patch: Any, points: HookPoints) -> None:
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
        refuse_tracing(args[0])
        return (self.forwards.arrive(self.index, args[0]), *args[1:]), kwargs

    # Blocks that merge within themselves.

    def merge_within(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        refuse_tracing(args[0])
        forward, x = self.forwards.within(self.index), self.tokens(args[0])
        given = by_name(self.block_names, args, kwargs)
        if forward.lengths[0] is None:
            forward.lengths[0] = self.lengths(given)
        mask = self.hiding(given.get(self.mask))
        merged = forward.merge_within(self.index, x, mask, self.keep(args[0]))
        if merged is x:
            return args, kwargs
        self.forwards.thread.inputs[self.index] = args[0]
        merged = self.like(args[0], merged)
        if not torch.compiler.is_compiling():
            self.forwards.of_inputs[merged] = forward
        return (merged, *args[1:]), kwargs

    def enter_within(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.forwards.enter_within(args[0])

    def unmerge_within(self, block: nn.Module, args: Args, output: Any) -> Any:
        tokens, rest = split(output)
        x = self.forwards.thread.inputs.pop(self.index, None)
        if x is None:
            return output
        change = self.tokens(tokens) - self.tokens(args[0])
        return join(x + self.like(x, self.forward.maps[self.index].unmerge(change)), rest)

    def lengths(self, given: Kwargs) -> Sequence[int] | None:
        """How many tokens each picture has, if all of them are packed into one sequence.

        given: what the block or its attention gets, by name.
        """
        return None

    def hiding(self, mask: Tensor | None) -> Tensor | None:
        """The block's mask, if it hides tokens."""
        return mask

    def tokens(self, x: Tensor) -> Tensor:
        """A block's input as [B, N, C]."""
        return x

    def like(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] in the form of a block's input x."""
        return tokens

    def keep(self, x: Tensor) -> int:
        """What the number of tokens that are left must be a multiple of."""
        return 1

    # Blocks whose tokens merge for good.

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

    def leave(self, block: nn.Module, args: Args, output: Any) -> Any:
        tokens, rest = split(output)
        return self.finish(block, join(self.forward.merge(self.index, tokens), rest))

    def finish(self, block: nn.Module, output: Any) -> Any:
        """output: what the block gives. Returns it with all tokens where somebody may keep it."""
        merged, rest = split(output)
        forward, after = self.forward, self.index + 1
        last = after == len(forward.schedule)
        if forward.settings.unmerge and (last or forward.collected or _is_watched(block)):
            merged = forward.all_tokens(after, merged)
        return join(merged if last else self.forwards.record(merged), rest)

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
        """Add log(size) to the logits of the keys; rotate each merged token like its head."""
        if self.idle:
            return args, kwargs
        given = by_name(self.names, args, kwargs)
        x = given.pop(self.names[0])
        bias = self.forward.key_bias(self.index, x, given.get(self.mask))
        given[self.mask] = None if bias is None else bias[:, None, None]
        if self.rotary and self.rotary.name in self.names:
            angles = given.get(self.rotary.name)
            given[self.rotary.name] = self.rotary.merged(angles, self.forward.maps[self.index])
        return (x,), given


def split(output: Any) -> tuple[Any, Any]:
    """What a block gives: its tokens, and what comes after them in a tuple, such as attention."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def join(tokens: Tensor, rest: Any) -> Any:
    return tokens if rest is None else (tokens, *rest)


def refuse_tracing(x: Any) -> None:
    """Raise TypeError where torch.fx takes a block apart, x being its input."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "torch.fx cannot trace a patched Vision Transformer, and a feature extractor that "
            "was traced before does not run its blocks: register a forward hook on the blocks, "
            "whose outputs then have all tokens"
        )


def _is_watched(block: nn.Module) -> bool:
    """Whether hooks of others may keep what the block gives, as feature extractors do."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_KEEP_NOTHING)
        for hook in block._forward_hooks.values()
    )
