"""What docs/adding-a-model.md says is all that a model of a third party needs."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests.support import tiny_transformers, tiny_unets
from tomesd import registry

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-model.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


class MyAttention(nn.Module):
    head_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = (each(x).unflatten(-1, (2, 8)) for each in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


class MyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.mlp = MyAttention(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(MyBlock(), MyBlock())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.fixture
def my_package(monkeypatch) -> Iterator[ModuleType]:
    """A package with models of the same parts as the host's, whose classes are not registered."""
    package = ModuleType("my_package")
    for name, host in (
        ("MyUNet", diffusers.UNet2DConditionModel),
        ("MyTransformer", diffusers.PixArtTransformer2DModel),
    ):
        setattr(package, name, type(name, (host,), {"__module__": "my_package"}))
        monkeypatch.delitem(registry._entries["diffusers"], host.__name__)
    MyViT.__module__ = "my_package"
    monkeypatch.setitem(sys.modules, "my_package", package)
    yield package
    registry._entries.pop("my_package", None)


def run_example(kind: str) -> None:
    (code,) = [code for code in EXAMPLES if re.search(rf"import .*\b{kind}\b", code)]
    exec(code, {})


def merges(model: nn.Module, call: Any, **settings: Any) -> None:
    """It is refused before it is registered; after, it merges and can be restored bit for bit."""
    with torch.no_grad():
        before = call()
        tomesd.apply_patch(model, **settings)
        patched = call()
        assert any(0 < row.merged < row.tokens for row in _rows(model))
        assert not torch.equal(patched, before)
        tomesd.remove_patch(model)
        assert torch.equal(call(), before)


def _rows(model: nn.Module) -> list:
    return [row for rows in tomesd.report(model).rows.values() for row in rows]


def test_a_unet_of_a_third_party_merges_once_it_is_registered(my_package):
    tiny = tiny_unets.TINY["UNet2DConditionModel"]
    model = tiny.build()
    model.__class__ = my_package.MyUNet
    with pytest.raises(TypeError, match="got MyUNet"):
        tomesd.apply_patch(model)
    run_example("UNet")
    assert "MyUNet" in tomesd.supported()["my_package"]
    merges(model, lambda: tiny.call(model))


def test_a_diffusion_transformer_of_a_third_party_merges_once_it_is_registered(my_package):
    tiny = tiny_transformers.TINY["PixArtTransformer2DModel"]
    model = tiny.build()
    model.__class__ = my_package.MyTransformer
    with pytest.raises(TypeError, match="got MyTransformer"):
        tomesd.apply_patch(model)
    run_example("DiT")
    merges(model, lambda: tiny.call(model))


def test_a_vision_transformer_of_a_third_party_merges_once_it_is_registered(my_package):
    torch.manual_seed(0)
    model, x = MyViT(), torch.randn(2, 65, 16)
    with pytest.raises(TypeError, match="got MyViT"):
        tomesd.apply_patch(model, r=8)
    run_example("ViT")
    merges(model, lambda: model(x), r=8)


def test_a_class_itself_can_be_registered_too(my_package):
    run_example("ViT")
    spec = registry.find(MyViT())
    assert spec is not None
    registry._entries.pop("my_package")
    tomesd.register(spec, MyViT)
    assert registry.find(MyViT()) is spec


def test_a_refused_class_says_why_and_a_class_that_inherits_from_it_too(my_package):
    registry.refuse("it has no tokens", "my_package.MyViT")

    class Child(MyViT):
        pass

    with pytest.raises(TypeError, match="model must not be a MyViT: it has no tokens"):
        tomesd.apply_patch(Child(), r=1)


@pytest.mark.parametrize(
    ("spec", "model", "error", "words"),
    [
        ("UNet", "my_package.MyViT", TypeError, "spec must be a UNet, DiT or ViT, got 'UNet'"),
        (None, "MyViT", ValueError, "models must be \"package.Class\", got 'MyViT'"),
        (None, "a.b.", ValueError, "models must be \"package.Class\", got 'a.b.'"),
        (None, 3, TypeError, 'models must be classes or "package.Class", got 3'),
    ],
)
def test_registering_something_else_is_refused_before_anything_changes(spec, model, error, words):
    spec = spec or registry.find(tiny_unets.TINY["UNet2DConditionModel"].build())
    before = tomesd.supported()
    with pytest.raises(error, match=re.escape(words)):
        tomesd.register(spec, "my_package.Other", model)
    assert tomesd.supported() == before
