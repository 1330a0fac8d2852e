"""Gradients of patched diffusion transformers are right, also where blocks are computed again."""

from functools import partial

import pytest
import torch

import tomesd
from tests.support.slow import TRANSFORMER_KINDS
from tests.support.tiny_transformers import TINY

# These have no gradient checkpointing, or their blocks are handed nothing in which a grid could
# travel: there the grid of the last forward pass counts.
WITHOUT_CHECKPOINTS = {"HunyuanDiT2DModel", "LuminaNextDiT2DModel"}
# What is learned comes in a tuple, which reentrant checkpoints do not look into.
NOT_REENTRANT = {
    "ErnieImageTransformer2DModel",
    "Kandinsky6Transformer3DModel",
    "MochiTransformer3DModel",
}
LAST_PASS_ONLY = {
    "AllegroTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "CogView3PlusTransformer2DModel",
    "ConsisIDTransformer3DModel",
    "ErnieImageTransformer2DModel",
    "Flux3Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "Kandinsky6Transformer3DModel",
    "LatteTransformer3DModel",
    "Lumina2Transformer2DModel",
    "PRXTransformer2DModel",
    "WanVACETransformer3DModel",
    "ZImageTransformer2DModel",
}


def _gradients(tiny, model, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    model.zero_grad()
    # Checkpoints leave out Chroma's mask in its single stream.
    given = {"attention_mask": None} if tiny.name == "ChromaTransformer2DModel" else {}
    outputs = [tiny.call(model, batch=1, h=h, w=w, **given) for h, w in sizes]
    sum(output.square().mean() for output in outputs).backward()
    # The last block's text is not used: its weights get zeros or nothing.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    return gradients


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        (name, reentrant)
        for name in sorted(TRANSFORMER_KINDS & set(TINY) - WITHOUT_CHECKPOINTS)
        for reentrant in ((False,) if name in NOT_REENTRANT else (False, True))
    ],
)
def test_gradients_are_the_same_with_and_without_checkpointing(name, reentrant):
    tiny = TINY[name]
    # As many tokens, but in another grid: two forward passes before one backward pass.
    sizes = [(4, 9)] if name in LAST_PASS_ONLY else [(4, 9), (9, 4)]
    model = tomesd.apply_patch(tiny.build().train(), use_rand=True)
    expected = _gradients(tiny, model, *sizes)
    model.enable_gradient_checkpointing(
        lambda module, *args, **kwargs: torch.utils.checkpoint.checkpoint(
            partial(module.__call__, **kwargs), *args, use_reentrant=reentrant
        )
    )
    computed = []
    for block in model._tomesd_patch.blocks:
        block.register_forward_pre_hook(lambda *_: computed.append(1))
    gradients = _gradients(tiny, model, *sizes)
    # Lumina2 has no checkpoints around the blocks that refine the image.
    once = len(getattr(model, "noise_refiner", ())) if name.startswith("Lumina2") else 0
    assert len(computed) == len(sizes) * (2 * len(model._tomesd_patch.blocks) - once)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_two_grids_before_one_backward_are_an_error_where_the_last_grid_counts():
    tiny = TINY["AuraFlowTransformer2DModel"]
    model = tomesd.apply_patch(tiny.build().train())
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="must have the tokens of the grids"):
        _gradients(tiny, model, (6, 6), (7, 9))
