"""What `tomesd.register` needs to know of a Vision Transformer."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from tomesd.registry import Spec
from tomesd.vit.layer import HookPoints, Layer
from tomesd.vit.rotary import Rotary
from tomesd.vit.settings import ViTSettings


class Places(NamedTuple):
    """Where the hooks of a block go, by the names of its modules; "attn.k_proj" is in a child.

    enter: the first module that gets the block's input. attention: self-attention.
    merge: the first module after attention, unmerge: the last one before its output is added to the
    residual stream. q, k, v: the modules whose outputs are queries, keys and values; only k is
    needed, unless the layer's hooks compute it.
    """

    enter: str
    attention: str
    merge: str
    unmerge: str
    q: str = ""
    k: str = ""
    v: str = ""


@dataclass(frozen=True)
class ViT(Spec):
    """How the Vision Transformers of one host are hooked.

    >>> block = Places("norm1", "attn", "norm2", "mlp", k="attn.key")
    >>> spec = ViT({"MyBlock": block}, prefix=lambda model: 1, tokens=lambda model: 197)
    >>> tomesd.register(spec, "my_package.MyViT")

    places: by the class of the block.
    prefix: how many class, distillation and register tokens lead the sequence.
    tokens: how many tokens, with the prefix, an input of the model's own size has.
    blocks: paths to the list of blocks in the model; the first one that exists counts. Or a
        function that gives the blocks, if only some of them merge.
    attention_mask: the argument of the attention that takes a mask to add to the logits,
        [B, 1, 1, N].
    rotary: how the attention gets the angles by which it rotates queries and keys, if it does.
    layer: the hooks on a block. Another class than `Layer` for attention that takes no such mask,
        or whose projections are not [B, N, heads · head_dim].
    check: raises an error for a model or settings that it does not go with.
    only: which blocks merge, if not all of them do.
    suffix: how many tokens at the end of the sequence never merge, if any.
    changes: whether the model itself changes what a block gives before the next one gets it.
    recorder: the module whose output holds the hidden states of all layers, if the host collects
        them; they are unmerged.
    """

    places: Mapping[str, Places]
    prefix: Callable[[Any], int]
    tokens: Callable[[Any], int]
    blocks: tuple[str, ...] | Callable[[Any], nn.ModuleList] = (
        "blocks",
        "layers",
        "encoder.layers",
        "encoder.layer",
    )
    attention_mask: str = "attention_mask"
    rotary: Rotary | None = None
    layer: type[Layer] = Layer
    check: Callable[[Any, ViTSettings], None] | None = None
    recorder: Callable[[Any], nn.Module] | None = None
    only: Callable[[Any], bool] | None = None
    suffix: Callable[[Any], int] | None = None
    changes: Callable[[Any], bool] | None = None

    def find_blocks(self, model: Any) -> nn.ModuleList:
        """Raises AttributeError if the model has none of the paths."""
        if callable(self.blocks):
            return self.blocks(model)
        for path in self.blocks:
            found: nn.ModuleList | None = _get(model, path)
            if found is not None:
                return found
        raise AttributeError(f"{type(model).__name__} has none of {', '.join(self.blocks)}")

    def modules(self, block: Any) -> list[Any]:
        """A block and those of its modules that are hooked, as far as it has them."""
        places = self.places.get(type(block).__name__, ())
        return [block, *(_get(block, path) for path in places if path)]

    def hook_points(self, index: int, block: Any) -> HookPoints:
        """Raises TypeError for a block of another class than `places` names, or of one that
        inherits from it and has a forward of its own."""
        kind = known_class(block, self.places)
        if kind is None:
            raise TypeError(
                f"model must have blocks of type {' or '.join(self.places)}, in which tokens can "
                f"merge between attention and MLP, or of a class that inherits their forward, got "
                f"{type(block).__name__} as block {index}"
            )
        places = self.places[kind]
        enter, attention, merge, unmerge = map(block.get_submodule, places[:4])
        features = {
            feature: block.get_submodule(path)
            for feature, path in zip("qkv", places[4:], strict=True)
            if path
        }
        return HookPoints(block, enter, attention, merge, unmerge, features)


def known_class(module: Any, names: Collection[str]) -> str | None:
    """The name of a module's class, or of the nearest one that it inherits its forward from, if it
    is among the names."""
    kind = type(module)
    found = next((base for base in kind.__mro__ if base.__name__ in names), None)
    return found.__name__ if found and kind.forward is found.forward else None  # type: ignore[attr-defined]


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
