"""What ran in a model: attention's queries and keys, what modules are given, and its hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class AttentionRecorder(TorchFunctionMode):
    """Records (queries, keys) of every call of fused attention inside a `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.masks: list[Tensor | None] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            given |= kwargs or {}
            self.seen.append((given["query"].shape[-2], given["key"].shape[-2]))
            self.masks.append(given.get("attn_mask"))
        return function(*args, **(kwargs or {}))


class RecordingProcessor:
    """A user's own attention processor around the model's, which records what it is given."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.seen: list[tuple[int, int]] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        self.seen.append((hidden_states.shape[1], keys.shape[1]))
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


@contextmanager
def attention_lengths(model: nn.Module) -> Iterator[dict[str, tuple[int, int]]]:
    """How many queries and keys each attention in a model has, by its name: its last call's."""
    seen: dict[str, dict[str, int]] = {}
    lengths: dict[str, tuple[int, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ == "Attention":
            own = seen.setdefault(name, {})
            for part in ("to_q", "to_k"):

                def record(_, args, name=name, own=own, part=part) -> None:
                    own[part] = args[0].shape[1]
                    if len(own) == 2:
                        lengths[name] = own["to_q"], own["to_k"]

                handles.append(getattr(module, part).register_forward_pre_hook(record))
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()


def is_spatial(name: str) -> bool:
    """Whether it is the self-attention of a picture's or a frame's tokens."""
    return ".attentions." in name and ".transformer_blocks." in name and name.endswith(".attn1")


@contextmanager
def inputs_of(model: nn.Module, suffix: str) -> Iterator[list[tuple[int, int]]]:
    """(batch, tokens) of what the modules whose name ends like this are given, call by call."""
    seen: list[tuple[int, int]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        for name, module in model.named_modules()
        if name.endswith(suffix)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def count_hooks(model: nn.Module) -> int:
    """How many forward hooks there are in a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
