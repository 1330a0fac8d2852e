"""The `slow` marker: `pytest` leaves out what has it, `pytest -m slow` runs that alone."""

import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

import pytest

slow = pytest.mark.slow

# Cases of one test in the default run.
CASES = 6
# Whose cases are their own sample, or cost nothing.
WHOLE = {"test_matrix", "test_errors"}


def slow_but(sample: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of which only a sample is in the default run; the others are slow."""
    return [value if value in sample else pytest.param(value, marks=slow) for value in values]


# One of each kind of hooks; the other families are hooked like one of these. What is a promise of
# the hooks alone is tested with these only.
TRANSFORMER_KINDS = {
    *("SD3Transformer2DModel", "SD3ControlNetModel", "AuraFlowTransformer2DModel"),
    *("FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"),
    *("QwenImageTransformer2DModel", "CogView4Transformer2DModel", "PixArtTransformer2DModel"),
    *("HunyuanDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"),
    *("WanTransformer3DModel", "WanVACETransformer3DModel", "LTXVideoTransformer3DModel"),
    *(
        "CogVideoXTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "ErnieImageTransformer2DModel",
    ),
    *("HiDreamImageTransformer2DModel", "Kandinsky5Transformer3DModel"),
}
VIT_KINDS = {
    *("timm", "timm with registers", "timm with norms after", "torchvision"),
    *("timm EVA-02", "timm BEiT", "DINOv3", "BEiT", "YOLOS", "HuBERT"),
    *("ViT", "ViTMAE", "DINOv2 backbone", "CLIP", "SigLIP 2", "VideoMAE", "BLIP", "AST", "Whisper"),
}


def is_variant(value: Any) -> bool:
    """Whether a parameter names a family, or is one, that is not in the sample."""
    name = value if isinstance(value, str) else getattr(value, "name", "")
    transformers, vits = _families()
    return (name in transformers and name not in TRANSFORMER_KINDS) or (
        name in vits and name not in VIT_KINDS
    )


def beyond_the_sample(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """The cases of a test with many that the default run leaves out.

    Chosen by a hash of their names: each n-th of a product of parameters could have one value of
    one of them only.
    """
    cases = defaultdict(list)
    for item in items:
        kept = item.path.stem in WHOLE or item.get_closest_marker("slow")
        if hasattr(item, "callspec") and not kept:
            cases[item.path, item.originalname].append(item)
    for found in cases.values():
        yield from sorted(found, key=lambda item: zlib.crc32(item.name.encode()))[CASES:]


@cache
def _families() -> tuple[set[str], set[str]]:
    # Imported late: these modules import this one.
    from tests.support import tiny_transformers, tiny_vits

    known = tiny_transformers.TINY | tiny_transformers.CONTROLNETS
    return set(known), set(tiny_vits.FAMILIES)
