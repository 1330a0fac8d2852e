"""Models whose linear layers are of bitsandbytes' eight or four bits merge like any other."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import tomesd
from tests.support.recorders import count_hooks
from tests.support.tiny_transformers import TINY
from tests.support.tiny_unets import predict, sd_unet

bnb = pytest.importorskip("bitsandbytes")

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
PIXART, WAN = "PixArtTransformer2DModel", "WanTransformer3DModel"
KINDS = pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
ORDERS = pytest.mark.parametrize("when", ["before", "after"])


def _quantize(model: nn.Module, kind: str) -> None:
    """What diffusers' BitsAndBytesConfig does to a model as it is loaded; that asks for a GPU."""
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()
    for path, parent in list(model.named_modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or any(part in f"{path}.{name}" for part in exact):
                continue
            shape, with_bias = (linear.in_features, linear.out_features), linear.bias is not None
            if kind == "int8":
                quantized = bnb.nn.Linear8bitLt(*shape, with_bias, has_fp16_weights=False)
            else:
                quantized = bnb.nn.Linear4bit(*shape, with_bias, torch.float32, quant_type=kind)
            quantized.load_state_dict(linear.state_dict())
            # Moving them to a device is what quantizes them. They are left in training mode: in
            # evaluation, some CPUs pack four bits anew, and only of layers wider than these.
            setattr(parent, name, quantized.requires_grad_(False).to("cpu").train())


def _both_orders(model: Any, when: str, kind: str, **settings) -> Any:
    """A model that merges and was quantized before or after patching."""
    if when == "before":
        _quantize(model, kind)
    tomesd.apply_patch(model, **settings)
    if when == "after":
        _quantize(model, kind)
    return model


@ORDERS
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *product(["int8", "nf4", "fp4"], [{}]),
        ("int8", {"merge_queries": False}),
        ("nf4", {"preset": "paper"}),
    ],
    ids=str,
)
def test_a_quantized_unet_merges(settings, kind, when):
    plain = sd_unet()
    exact = predict(plain)
    _quantize(plain, kind)
    unpatched = predict(plain)
    assert not torch.equal(unpatched, exact)
    expected = predict(tomesd.apply_patch(plain, **settings))
    assert not torch.equal(expected, unpatched)
    unet = _both_orders(sd_unet(), when, kind, **settings)
    assert torch.equal(predict(unet), expected)
    assert torch.equal(predict(tomesd.remove_patch(unet)), unpatched)
    assert count_hooks(unet) == 0


@ORDERS
@KINDS
@pytest.mark.parametrize("name", [SD3, FLUX, PIXART, WAN])
@torch.no_grad()
def test_a_quantized_transformer_merges(name, kind, when):
    tiny = TINY[name]
    plain = tiny.build()
    exact = tiny.call(plain)
    _quantize(plain, kind)
    unpatched = tiny.call(plain)
    assert not torch.equal(unpatched, exact)
    expected = tiny.call(tomesd.apply_patch(plain))
    assert not torch.equal(expected, unpatched)
    model = _both_orders(tiny.build(), when, kind)
    assert torch.equal(tiny.call(model), expected)
    assert torch.equal(tiny.call(tomesd.remove_patch(model)), unpatched)
