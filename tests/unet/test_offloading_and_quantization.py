"""Where else people run a UNet that merges: device maps, wrappers, casts and quantized weights.

"before": that was done before patching.
"""

from typing import Any

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tomesd
from tests.support.recorders import count_hooks, inputs_of
from tests.support.tiny_pipelines import sample, sd_pipeline
from tests.support.tiny_unets import predict, sd_unet, unet_inputs

ORDERS = pytest.mark.parametrize("when", ["before", "after"])
SETTINGS = pytest.mark.parametrize("settings", [{}, {"preset": "paper"}], ids=str)


def _both_orders(when: str, change, **settings) -> Any:
    """A UNet that merges and to which something was done, before or after patching."""
    unet = sd_unet()
    if when == "before":
        change(unet)
    tomesd.apply_patch(unet, **settings)
    if when == "after":
        change(unet)
    return unet


def _lengths(unet) -> list[int]:
    """Of what each self-attention gets."""
    with inputs_of(unet, "attn1") as seen:
        predict(unet)
    return [tokens for _, tokens in seen]


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_unet_loaded_with_a_device_map_merges(rest, tmp_path):
    sd_unet().save_pretrained(tmp_path / "unet")
    device_map = {name: "cpu" for name, _ in sd_unet().named_children()} | {"up_blocks": rest}
    unet = type(sd_unet()).from_pretrained(
        tmp_path / "unet", device_map=device_map, offload_folder=tmp_path / "weights"
    )
    assert any(each.device.type == "meta" for each in unet.parameters()) == (rest == "disk")
    unpatched = predict(unet)
    expected = predict(tomesd.apply_patch(sd_unet()))
    assert torch.equal(predict(tomesd.apply_patch(unet)), expected)
    assert torch.equal(predict(tomesd.remove_patch(unet)), unpatched)


def test_a_pipeline_saved_while_merging_is_loaded_without_the_patch_and_merges_as_before(tmp_path):
    pipe = sd_pipeline()
    unpatched = sample(pipe)
    merged = sample(tomesd.apply_patch(pipe))
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert count_hooks(loaded.unet) == 0
    assert torch.equal(sample(loaded), unpatched)
    assert torch.equal(sample(tomesd.apply_patch(loaded)), merged)


@ORDERS
def test_offloading_a_pipeline_by_groups_gives_the_same_picture(when):
    expected = sample(tomesd.apply_patch(sd_pipeline()))
    pipe = sd_pipeline()
    if when == "after":
        tomesd.apply_patch(pipe)
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    if when == "before":
        tomesd.apply_patch(pipe)
    assert torch.equal(sample(pipe), expected)


@ORDERS
@SETTINGS
def test_weights_stored_in_eight_bits_and_cast_layer_by_layer_merge(settings, when):
    def change(unet) -> None:
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

    plain = sd_unet()
    change(plain)
    unpatched = predict(plain)
    unet = _both_orders(when, change, **settings)
    merged = predict(unet)
    assert torch.equal(merged, predict(tomesd.apply_patch(plain, **settings)))
    assert not torch.equal(merged, unpatched)
    assert torch.equal(predict(tomesd.remove_patch(unet)), unpatched)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in unet.parameters()}


@ORDERS
def test_a_data_parallel_unet_merges(when):
    expected = predict(tomesd.apply_patch(sd_unet()))
    unet = sd_unet()
    if when == "before":
        wrapped = nn.DataParallel(tomesd.apply_patch(unet))
    else:
        wrapped = tomesd.apply_patch(nn.DataParallel(unet))
    with torch.no_grad():
        assert torch.equal(wrapped(**unet_inputs(unet)).sample, expected)
    tomesd.remove_patch(wrapped)
    assert count_hooks(unet) == 0


@ORDERS
def test_a_prepared_unet_of_accelerate_merges(when):
    accelerator = accelerate.Accelerator(cpu=True)
    expected = predict(tomesd.apply_patch(sd_unet()))
    unet = sd_unet()
    if when == "before":
        tomesd.apply_patch(unet)
    prepared = accelerator.prepare(unet)
    if when == "after":
        tomesd.apply_patch(prepared)
    assert torch.equal(predict(prepared), expected)
    assert torch.equal(predict(accelerator.unwrap_model(prepared)), expected)


@ORDERS
def test_an_attention_backend_of_the_users_choice_gives_the_same_output(when):
    expected = predict(tomesd.apply_patch(sd_unet()))
    unet = _both_orders(when, lambda unet: unet.set_attention_backend("native"))
    assert torch.equal(predict(unet), expected)


@ORDERS
@SETTINGS
def test_weights_quantized_by_torchao_merge(settings, when):
    def change(unet) -> None:
        quantize_(unet, Int8WeightOnlyConfig())

    plain = sd_unet()
    exact = predict(plain)
    change(plain)
    unpatched = predict(plain)
    assert not torch.equal(unpatched, exact)
    unet = _both_orders(when, change, **settings)
    merged = predict(unet)
    assert torch.equal(merged, predict(tomesd.apply_patch(plain, **settings)))
    assert max(_lengths(unet)) == 70
    assert torch.equal(predict(tomesd.remove_patch(unet)), unpatched)
    assert max(_lengths(unet)) == 140
