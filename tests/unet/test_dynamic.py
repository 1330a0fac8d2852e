"""A UNet that is compiled for any size, or within something larger, merges too."""

import torch
from torch._dynamo.testing import CompileCounter

import tomesd
from tests.support.slow import slow
from tests.support.tiny_unets import sd_unet, unet_inputs

SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "layers_per_block": 1,
}


@slow
@torch.no_grad()
def test_a_unet_compiled_for_any_size_merges_at_each():
    torch.compiler.reset()
    unet = tomesd.apply_patch(sd_unet(**SMALL), ratio=0.5)
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True, dynamic=True)
    for h, w in ((16, 16), (16, 24), (24, 32)):
        inputs = unet_inputs(unet, h=h, w=w)
        torch.testing.assert_close(compiled(**inputs).sample, unet(**inputs).sample)
    assert counter.frame_count <= 3


@slow
@torch.no_grad()
def test_code_that_was_compiled_around_a_model_notices_its_patch():
    unet = sd_unet(**SMALL)
    inputs = unet_inputs(unet)
    step = torch.compile(lambda: unet(**inputs).sample, backend="eager")
    before = step()
    tomesd.apply_patch(unet, ratio=0.5)
    patched = step()
    assert not torch.allclose(patched, before, atol=1e-4)
    torch.testing.assert_close(patched, unet(**inputs).sample)
    tomesd.remove_patch(unet)
    torch.testing.assert_close(step(), before)
