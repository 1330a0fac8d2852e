"""What every family of Vision Transformers promises, with merging on and off."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import tomesd
from tests.support.recorders import count_hooks
from tests.support.slow import VIT_KINDS
from tests.support.tiny_vits import FAMILIES, SPEECH, Vit, build
from tests.support.tiny_vits_base import tokens_of
from tests.support.vit_reference import encode, unmerge

families = pytest.mark.parametrize("name", FAMILIES)
kinds = pytest.mark.parametrize("name", sorted(VIT_KINDS))

# More than half of what is left in the last layer of the smaller models: clipped there.
R = [3, 0, 9]


def run_patched(vit: Vit, **settings) -> tuple[Tensor, Tensor]:
    """With the patch: what goes into the first block, and what comes out of the last.

    The patch is gone afterwards, so that the reference can call the model's own modules.
    """
    tomesd.apply_patch(vit.model, **settings)
    seen = {}
    hooks = [
        vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0])),
        vit.blocks[-1].register_forward_hook(lambda _, args, out: seen.update(last=tokens_of(out))),
    ]
    try:
        vit.output()
    finally:
        for hook in hooks:
            hook.remove()
        tomesd.remove_patch(vit.model)
    return seen["first"], seen["last"]


def patched_encoder(vit: Vit):
    return next(m for m in vit.model.modules() if "_tomesd_patch" in m.__dict__)


def groups_of_last_run(vit: Vit) -> list[list[int]]:
    return patched_encoder(vit)._tomesd_patch.forward.maps[-1].group.tolist()


@families
@torch.no_grad()
def test_r_0_changes_nothing_bit_for_bit(name):
    vit = build(name)
    expected = vit.output()
    tomesd.apply_patch(vit.model, r=0)
    assert torch.equal(vit.output(), expected)


@families
@torch.no_grad()
def test_merged_blocks_compute_what_the_paper_says(name):
    vit = build(name)
    first, last = run_patched(vit, r=R)
    for tokens, got in zip(first, last, strict=True):
        merged, groups = encode(tokens, vit.reference, R, vit.prefix, suffix=vit.suffix)
        assert len(groups) < len(tokens) - 3
        torch.testing.assert_close(got, unmerge(merged, groups), atol=1e-4, rtol=1e-4)


# With detection tokens at the end, distillation, rotary positions, and a bias by places.
@pytest.mark.parametrize("name", ["YOLOS", "DeiT", "Pixtral", "BEiT"])
@torch.no_grad()
def test_in_the_paper_s_order_protected_tokens_keep_their_ends_and_values(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=R, order="concatenated")
    vit.output()
    end = patched_encoder(vit)._tomesd_patch.forward.maps[-1]
    n, m = end.n, end.m
    head = end.head
    assert head[:, : vit.prefix].tolist() == [list(range(vit.prefix))] * len(head)
    assert head[:, m - vit.suffix :].tolist() == [list(range(n - vit.suffix, n))] * len(head)
    assert (head.diff() < 0).any()
    tomesd.apply_patch(vit.model, r=[3, 0, 0], order="concatenated")
    once = vit.output()
    tomesd.apply_patch(vit.model, r=[3, 0, 0])
    torch.testing.assert_close(vit.output(), once, atol=1e-4, rtol=1e-4)


NEED_ALL = ("ViTMAE", "EoMT", "EoMT DINOv3", *(name for name in FAMILIES if "backbone" in name))


# What decodes or maps patches needs them all.
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in NEED_ALL])
@torch.no_grad()
def test_without_unmerge_the_output_has_the_merged_tokens(name):
    vit = build(name)
    first, last = run_patched(vit, r=R, unmerge=False, prop_attn=False)
    for tokens, got in zip(first, last, strict=True):
        merged, _ = encode(tokens, vit.reference, R, vit.prefix, prop_attn=False, suffix=vit.suffix)
        torch.testing.assert_close(got, merged, atol=1e-4, rtol=1e-4)


@families
@torch.no_grad()
def test_removing_the_patch_restores_the_output_bit_for_bit(name):
    vit = build(name)
    expected, hooks = vit.output(), count_hooks(vit.model)
    tomesd.apply_patch(vit.model, r=3)
    assert not torch.equal(vit.output(), expected)
    tomesd.remove_patch(vit.model)
    assert torch.equal(vit.output(), expected)
    assert count_hooks(vit.model) == hooks


@families
@torch.no_grad()
def test_class_distillation_and_register_tokens_never_merge(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=100)
    vit.output()
    assert patched_encoder(vit)._tomesd_patch.prefix == vit.prefix
    for group in groups_of_last_run(vit):
        end = len(group) - vit.suffix
        for special in (*range(vit.prefix), *range(end, len(group))):
            assert group.count(group[special]) == 1
        assert len(set(group[vit.prefix : end])) < end - vit.prefix


def assert_has_its_own_patch(twin: Vit, expected: Tensor, plain: Tensor) -> None:
    assert torch.equal(twin.output(), expected)
    tomesd.remove_patch(twin.model)
    assert torch.equal(twin.output(), plain)


@kinds
@torch.no_grad()
def test_deep_copies_have_patches_of_their_own(name):
    vit = build(name)
    plain = vit.output()
    tomesd.apply_patch(vit.model, r=3)
    expected = vit.output()
    assert_has_its_own_patch(copy.deepcopy(vit), expected, plain)
    assert torch.equal(vit.output(), expected)


# The hooks with which transformers' backbones collect feature maps do not pickle, nor do the
# convolutions of speech encoders.
@pytest.mark.parametrize(
    "name", [name for name in sorted(VIT_KINDS) if "backbone" not in name and name not in SPEECH]
)
@torch.no_grad()
def test_pickles_have_patches_of_their_own(name):
    vit = build(name)
    plain = vit.output()
    tomesd.apply_patch(vit.model, r=3)
    expected = vit.output()
    loaded = pickle.loads(pickle.dumps(vit.model))
    assert_has_its_own_patch(Vit(loaded, vit.inputs, [], [], vit.prefix), expected, plain)


@kinds
@torch.no_grad()
def test_what_blocks_give_is_saved_and_loaded_like_any_tensor(name, tmp_path):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=3)
    given = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: given.append(tokens_of(out)))
    vit.output()
    for i, tensor in enumerate(given):
        torch.save(tensor, tmp_path / str(i))
        assert torch.equal(torch.load(tmp_path / str(i), weights_only=True), tensor)
        assert not vars(tensor)


@kinds
@torch.no_grad()
def test_a_block_that_gets_other_tokens_than_its_model_gives_it_is_an_error(name):
    vit, given = build(name), {}
    hook = vit.blocks[1].register_forward_pre_hook(
        lambda block, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    vit.output()
    hook.remove()
    x, *rest = given["args"]
    tomesd.apply_patch(vit.model, r=3)
    message = r"block 1 of a patched Vision Transformer must be called by its model, .*remove_patch"
    for run in (lambda: None, vit.output):  # Before the first forward, and after one.
        run()
        with pytest.raises(RuntimeError, match=message):
            vit.blocks[1](x.clone(), *rest, **given["kwargs"])
    expected = vit.output()
    assert torch.equal(vit.output(), expected)
    tomesd.remove_patch(vit.model)
    vit.blocks[1](x, *rest, **given["kwargs"])


@torch.no_grad()
def test_what_a_run_leaves_is_not_saved():
    vit = build("timm")
    tomesd.apply_patch(vit.model, r=3)
    before = pickle.dumps(vit.model)
    vit.output()
    assert len(pickle.dumps(vit.model)) == len(before)


@kinds
def test_the_state_dict_keeps_its_keys(name):
    vit = build(name)
    keys = list(vit.model.state_dict())
    tomesd.apply_patch(vit.model, r=3)
    vit.output()
    assert list(vit.model.state_dict()) == keys


@families
@torch.no_grad()
def test_bfloat16_models_merge_in_bfloat16(name):
    vit = build(name)
    vit.model.bfloat16()
    vit.inputs = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in vit.inputs.items()
    }
    dtype = vit.output().dtype
    tomesd.apply_patch(vit.model, r=3)
    out = vit.output()
    assert out.dtype == dtype
    assert out.isfinite().all()
    run = patched_encoder(vit)._tomesd_patch.forward
    assert run.maps[-1].m == run.maps[0].n - 9
    assert run.maps[-1].size.sum(1).flatten().tolist() == [run.maps[0].n] * len(run.maps[0].size)


@families
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_output(name):
    vit = build(name)
    empty = {key: value[:0] for key, value in vit.inputs.items()}
    try:
        expected = vit.model(**empty)
    except (RuntimeError, ValueError):
        pytest.skip("its host takes no empty batch")
    tomesd.apply_patch(vit.model, r=R)
    got = vit.model(**empty)
    first = [out if isinstance(out, Tensor) else out[0] for out in (got, expected)]
    assert first[0].shape == first[1].shape
