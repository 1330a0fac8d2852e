"""Vision-language models: how many visual tokens a tower gives, and who needs a whole grid."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tomesd.hooks import PATCH
from tomesd.vit.patch import ViTPatch
from tomesd.vit.schedule import tokens_after as after_each

# Modules between tower and language model that put the visual tokens into rows and columns, by what
# they do. Checked against transformers 5.24.
_JOINS, _AVERAGES = "joins the cells of the token grid", "averages the cells of the token grid"
_TILES = "puts the tokens of an image's tiles together"
_NEED_A_GRID = {
    "AriaProjector": "chooses its queries by the number of tokens",
    "AyaVisionMultiModalProjector": _JOINS,
    "Cohere2VisionMultiModalProjector": _JOINS,
    "Gemma3MultiModalProjector": _AVERAGES,
    "Idefics2Model": "masks patches by position",
    "Idefics3Connector": _JOINS,
    "InternVLModel": _JOINS,
    "Lfm2VlMultiModalProjector": _JOINS,
    "LightOnOcrMultiModalProjector": _JOINS,
    "LlavaNextModel": _TILES,
    "LlavaNextVideoModel": _TILES,
    "LlavaOnevisionModel": _TILES,
    "Mistral3MultiModalProjector": _JOINS,
    "MistralLarge4MultiModalProjector": _JOINS,
    "ModernVBertConnector": _JOINS,
    "PerceptionLMAdaptiveAvgPooling": _AVERAGES,
    "SmolVLMConnector": _JOINS,
    "T5Gemma2MultiModalProjector": _AVERAGES,
    "VipLlavaModel": "joins the hidden states of several layers",
}
# The same beside a certain tower.
_WITH_TOWER = {("LlavaModel", "PixtralVisionModel"): "splits tokens by the sizes of pictures"}


def check_projectors(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if one of these modules needs a value for every token."""
    names = dict.fromkeys(type(module).__name__ for module in modules)
    found = {name: _NEED_A_GRID[name] for name in names if name in _NEED_A_GRID}
    found |= {pair[0]: does for pair, does in _WITH_TOWER.items() if names.keys() >= set(pair)}
    for name, does in found.items():
        raise ValueError(
            f"unmerge must be True with {name}, which {does} and so needs a value for every token, "
            "got False"
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
