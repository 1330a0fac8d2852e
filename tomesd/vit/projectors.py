"""Vision-language models: how many visual tokens a tower gives, and who needs a whole grid."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tomesd.hooks import PATCH
from tomesd.vit.patch import ViTPatch
from tomesd.vit.schedule import tokens_after as after_each

# Modules between tower and language model that put the visual tokens into rows and columns, by what
# they do. Checked against transformers 5.24.
_NEED_A_GRID = {
    "Gemma3MultiModalProjector": "averages the cells of the token grid",
    "Idefics2Model": "masks patches by position",
    "Idefics3Connector": "joins the cells of the token grid",
    "SmolVLMConnector": "joins the cells of the token grid",
    "InternVLModel": "joins the cells of the token grid",
    "AyaVisionMultiModalProjector": "joins the cells of the token grid",
    "LlavaNextModel": "puts the tokens of an image's tiles together",
    "LlavaNextVideoModel": "puts the tokens of an image's tiles together",
    "LlavaOnevisionModel": "puts the tokens of an image's tiles together",
    "VipLlavaModel": "joins the hidden states of several layers",
}


def check_projectors(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if one of these modules needs a value for every token."""
    for module in modules:
        name = type(module).__name__
        if name in _NEED_A_GRID:
            raise ValueError(
                f"unmerge must be True with {name}, which {_NEED_A_GRID[name]} and so needs a "
                "value for every token, got False"
            )


def tokens_after(model: Any, hidden_state: int = -1, tokens: int | None = None) -> int:
    """How many tokens a patched Vision Transformer returns with unmerge=False.

    >>> tokens_after(vit)
    101

    model: a patched Vision Transformer, or a model that contains one, such as a vision-language
        model, whose prompts need this many placeholders for an image.
    hidden_state: which of the model's hidden states is read: 0 is the input of the first layer, −1
        the output of the last one (the default, the usual features), −2 the one that LLaVA reads.
    tokens: how many enter the first layer; None: as for the model's own image size.
    Returns the number including class, distillation and register tokens.
    Raises ValueError unless exactly one Vision Transformer is patched, or for a hidden state that
        the model does not have.
    """
    patches = [module.__dict__[PATCH] for module in model.modules() if PATCH in module.__dict__]
    found = [patch for patch in patches if isinstance(patch, ViTPatch)]
    if len(found) != 1:
        raise ValueError(f"model must have one patched Vision Transformer, got {len(found)}")
    patch = found[0]
    first = patch.own_tokens if tokens is None else tokens
    counts = [first, *after_each(patch.forward.schedule, first, patch.prefix)]
    if not -len(counts) <= hidden_state < len(counts):
        raise ValueError(
            f"hidden_state must be from {-len(counts)} to {len(counts) - 1}, got {hidden_state}"
        )
    return counts[hidden_state]
