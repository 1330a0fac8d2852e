"""The caches that merging is measured beside skip what they say, and leave models as they were."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tomesd
from benchmarks.caches.known import UNET_CACHES, repeat
from benchmarks.caches.repeat import every, spread, transformer_blocks
from benchmarks.caches.work import counted
from tests.support.recorders import count_hooks
from tests.support.tiny_shapes import untrained_pipeline

# DeepCache comes from PyPI.
CACHES = {
    "repeat": repeat(2),
    **{name: UNET_CACHES[name] for name in ("pyramid attention broadcast 2", "TaylorSeer 2")},
}


@pytest.fixture(scope="module")
def pipe():
    pipe = untrained_pipeline()
    pipe.scheduler.set_timesteps(6)
    return pipe


def denoise(pipe, steps: int = 6, first: float = 0.0) -> list[torch.Tensor]:
    """What the UNet gives in each step of an image."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 16, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        return [
            pipe.unet(noise * (1 - 0.1 * step) + first, t, text).sample
            for step, t in enumerate(pipe.scheduler.timesteps[:steps])
        ]


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_saves_work_begins_anew_with_each_image_and_is_removed_bit_for_bit(pipe, name):
    before = denoise(pipe)
    with counted(pipe.unet) as whole:
        denoise(pipe)
    with CACHES[name](pipe, pipe.unet):
        denoise(pipe, first=1.0)
        with counted(pipe.unet) as work:
            cached = denoise(pipe)
        assert all(torch.equal(a, b) for a, b in zip(cached, denoise(pipe), strict=True))
    assert torch.equal(cached[0], before[0])
    assert not all(torch.equal(a, b) for a, b in zip(cached, before, strict=True))
    assert work.flops < whole.flops
    assert count_hooks(pipe.unet) == 0
    assert all(torch.equal(a, b) for a, b in zip(denoise(pipe), before, strict=True))


def test_blocks_add_again_exactly_what_they_added_in_the_last_computed_step(pipe):
    block = transformer_blocks(pipe.unet)[0]
    seen = []
    handle = block.register_forward_hook(lambda block, args, y: seen.append((args[0], y)))
    with repeat(2)(pipe, pipe.unet), counted(pipe.unet) as work:
        denoise(pipe, steps=3)
    handle.remove()
    assert len(seen) == 2  # Called in the first two steps of 6 alone: a fifth of them, rounded up.
    assert every(6, 2)[:3] == (True, True, False)
    assert work.flops > 0


def test_merging_in_the_computed_steps_saves_the_product_of_both(pipe):
    def flops(cache, ratio):
        with tomesd.patched(pipe.unet, ratio=ratio, max_downsample=8):
            if not cache:
                with counted(pipe.unet) as work:
                    denoise(pipe)
                return work.flops
            with repeat(3)(pipe, pipe.unet), counted(pipe.unet) as work:
                denoise(pipe)
            return work.flops

    whole, merged, cached, both = (flops(c, r) for c in (False, True) for r in (0.0, 0.5))
    assert both / whole == pytest.approx(merged / whole * cached / whole)


def test_work_is_what_pytorch_counts(pipe):
    block = transformer_blocks(pipe.unet)[0]
    x, text = torch.randn(2, 64, 32), torch.randn(2, 16, 96)
    counter = FlopCounterMode(display=False)  # It does not count fused attention on the CPU.
    with torch.no_grad(), counted(pipe.unet) as work, sdpa_kernel(SDPBackend.MATH), counter:
        block(x, encoder_hidden_states=text)
    assert work.flops == counter.get_total_flops()


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
def test_computed_steps_are_as_many_as_asked_for_and_the_last_is_one_of_them(steps):
    for computed in range(1, steps + 1):
        chosen = spread(steps, computed)
        assert len(chosen) == steps
        assert sum(chosen) == computed
        assert chosen[0]
        assert chosen[-1] or computed <= max(1, -(-steps // 5))
