"""Gradients of patched diffusion transformers are right, also where blocks are computed again."""

import pytest
import torch

import tomesd
from tests.tiny_transformers import TINY

# These have no gradient checkpointing, or their blocks are handed nothing in which a grid could
# travel: there the grid of the last forward pass counts.
WITHOUT_CHECKPOINTS = {"HunyuanDiT2DModel"}
LAST_PASS_ONLY = {"AuraFlowTransformer2DModel", "LatteTransformer3DModel"}


def _gradients(tiny, model, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    model.zero_grad()
    outputs = [tiny.call(model, batch=1, h=h, w=w) for h, w in sizes]
    sum(output.square().mean() for output in outputs).backward()
    # The last block's text is not used: its weights get zeros or nothing.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    return gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", sorted(set(TINY) - WITHOUT_CHECKPOINTS))
def test_gradients_are_the_same_with_and_without_checkpointing(name, reentrant):
    tiny = TINY[name]
    # As many tokens, but in another grid: two forward passes before one backward pass.
    sizes = [(4, 9)] if name in LAST_PASS_ONLY else [(4, 9), (9, 4)]
    model = tomesd.apply_patch(tiny.model().train(), use_rand=True)
    expected = _gradients(tiny, model, *sizes)
    model.enable_gradient_checkpointing(
        lambda module, *args: torch.utils.checkpoint.checkpoint(
            module.__call__, *args, use_reentrant=reentrant
        )
    )
    computed = []
    for block in model._tomesd_patch.blocks:
        block.register_forward_pre_hook(lambda *_: computed.append(1))
    gradients = _gradients(tiny, model, *sizes)
    assert len(computed) == 2 * len(sizes) * len(model._tomesd_patch.blocks)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_grid_of_another_pass_is_an_error_where_it_cannot_be_told():
    tiny = TINY["AuraFlowTransformer2DModel"]
    model = tomesd.apply_patch(tiny.model().train())
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="must have the tokens of the grids"):
        _gradients(tiny, model, (6, 6), (7, 9))
