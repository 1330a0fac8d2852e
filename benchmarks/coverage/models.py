"""Every model of timm and transformers that sees or hears, and whether its tokens merge."""

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tomesd
from benchmarks.common import markdown
from tomesd.api import patched_modules

SENSES = {"image", "video", "audio"}


@dataclass(frozen=True)
class Covered:
    """One model.

    encoder: the class that is hooked, or that is refused. merges: "for good", "within blocks" where
    nothing else goes, or "" with the reason in why.
    """

    host: str
    name: str
    encoder: str
    merges: str
    why: str = ""


def cover(host: str, name: str, model: nn.Module) -> Covered:
    """Patch a model, which may be on the meta device: nothing runs."""
    why = ""
    for merges, within in (("for good", False), ("within blocks", True)):
        try:
            tomesd.apply_patch(model, r=1, within_blocks=within)
        except (TypeError, ValueError) as error:
            why = why or str(error)
        else:
            encoder = next(iter(patched_modules(model).values()))
            return Covered(host, name, type(encoder).__name__, merges)
    return Covered(host, name, type(model).__name__, "", why)


def transformers_models() -> Iterator[Covered]:
    """Classes of transformers that take images, videos or sound, with the default configuration;
    those that cannot be built so are left out."""
    import transformers

    transformers.logging.set_verbosity_error()
    for name in dir(transformers):
        found = getattr(transformers, name, None)
        if not inspect.isclass(found) or not issubclass(found, transformers.PreTrainedModel):
            continue
        kind: Any = found
        # Speech encoders of the oldest code name the argument only.
        senses = set(getattr(kind, "input_modalities", None) or ())
        hears = getattr(kind, "main_input_name", "") == "input_values"
        if name.endswith("PreTrainedModel") or not (senses & SENSES or hears):
            continue
        try:
            with torch.device("meta"):
                model = kind(kind.config_class())
        except Exception:
            continue
        yield cover("transformers", name, model)


def timm_models() -> Iterator[Covered]:
    """Models of timm; those without a list of blocks are convolutional and left out."""
    import timm

    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        if hasattr(model, "blocks") or hasattr(model, "attn_pool"):
            yield cover("timm", name, model)


HOSTS = {"transformers": transformers_models, "timm": timm_models}


def table(found: list[Covered]) -> str:
    """How many models of each host merge, by the class that is hooked."""
    rows = []
    for host in HOSTS:
        merging = [each for each in found if each.host == host and each.merges]
        if not merging:
            continue
        within = Counter(each.encoder for each in merging if each.merges == "within blocks")
        counts = Counter(each.encoder for each in merging)
        rows.append([f"**{host}**", f"**{len(merging)}**", f"**{len(counts)} classes**"])
        rows += [
            [name, str(count), "within blocks" if name in within else "for good"]
            for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0].lower()))
        ]
    return markdown.table(["encoder", "models", "merge"], rows)
