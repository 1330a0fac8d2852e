"""Every model of timm and transformers that sees or hears, and whether its tokens merge."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import tomesd
from benchmarks.common import markdown
from tomesd.api import patches_of

SENSES = {"image", "video", "audio"}
# What parameters are initialized by.
_INITIALIZES = (
    *("normal_", "uniform_", "erfinv_", "fill_", "zero_"),
    *("clamp_", "add_", "mul_", "div_"),
)


class Uninitialized(TorchFunctionMode):
    """Parameters stay as they are: on the meta device, that takes most of the time of building."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _INITIALIZES:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


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
            encoder, _ = next(iter(patches_of(model).values()))
            return Covered(host, name, type(encoder).__name__, merges)
    return Covered(host, name, type(model).__name__, "", why)


@dataclass(frozen=True)
class Host:
    """Whose models are counted. names: of all of them. build: makes one; None for what is no
    encoder. It runs on the meta device, where no weights are made."""

    names: Callable[[], list[str]]
    build: Callable[[str], nn.Module | None]


def _transformers_names() -> list[str]:
    """Classes of transformers that take images, videos or sound."""
    import transformers

    transformers.logging.set_verbosity_error()
    return [name for name in dir(transformers) if _senses(getattr(transformers, name, None))]


def _senses(kind: Any) -> bool:
    import transformers

    if not inspect.isclass(kind) or not issubclass(kind, transformers.PreTrainedModel):
        return False
    # Speech encoders of the oldest code name the argument only.
    hears = getattr(kind, "main_input_name", "") == "input_values"
    found = set(getattr(kind, "input_modalities", None) or ())
    return not kind.__name__.endswith("PreTrainedModel") and bool(found & SENSES or hears)


def _transformers_model(name: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class())
    return model


def _timm_names() -> list[str]:
    """Of the modules of timm in which something is called attention or transformer."""
    import timm

    names = set()
    for module in timm.list_modules():
        classes = " ".join(vars(import_module(f"timm.models.{module}")))
        if "Attention" in classes or "Transformer" in classes:
            names |= set(timm.list_models(module=module))
    return sorted(names)


def _timm_model(name: str) -> nn.Module | None:
    """Those without a list of blocks are convolutional."""
    import timm

    model: nn.Module = timm.create_model(name)
    return model if hasattr(model, "blocks") or hasattr(model, "attn_pool") else None


HOSTS = {
    "transformers": Host(_transformers_names, _transformers_model),
    "timm": Host(_timm_names, _timm_model),
}


def cover_all(hosts: Sequence[str], known: Sequence[Covered]) -> Iterator[Covered]:
    """Every model of these hosts; those that are known already come first.

    Nothing needs to have a default configuration: what cannot be built has that as its reason.
    """
    done = {(each.host, each.name) for each in known}
    yield from known
    todo = [(host, name) for host in hosts for name in HOSTS[host].names()]
    for host, name in tqdm([each for each in todo if each not in done], unit="model"):
        try:
            with torch.device("meta"), Uninitialized():
                model = HOSTS[host].build(name)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            yield Covered(host, name, "", "", f"not built: {type(error).__name__}: {reason}"[:300])
        else:
            none = Covered(host, name, "", "", "has no blocks")
            yield none if model is None else cover(host, name, model.eval())


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
