"""Whoever keeps what the blocks of a Vision Transformer give gets all tokens, at every index."""

import pytest
import timm
import torch
import transformers as hf
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor

import tomesd
from tests.support.slow import VIT_KINDS, slow
from tests.support.tiny_vits import FAMILIES, TIMM, Vit, build
from tests.support.tiny_vits_base import tokens_of
from tests.support.vit_reference import encode, unmerge

R = [0, 5, 9]

families = pytest.mark.parametrize("name", FAMILIES)
kinds = pytest.mark.parametrize("name", sorted(VIT_KINDS))
of_timm = pytest.mark.parametrize("name", TIMM)


def expected_after_each_block(vit: Vit, first: Tensor) -> list[Tensor]:
    """first: what goes into the first block."""
    depths = range(1, len(vit.blocks) + 1)
    return [
        torch.stack(
            [
                unmerge(
                    *encode(
                        tokens,
                        vit.reference[:depth],
                        R[:depth],
                        vit.prefix,
                        suffix=vit.suffix,
                    )
                )
                for tokens in first
            ]
        )
        for depth in depths
    ]


@torch.no_grad()
def first_tokens(vit: Vit) -> Tensor:
    seen = []
    hook = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vit.output()
    hook.remove()
    return seen[0]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@families
@torch.no_grad()
def test_hooks_on_the_blocks_see_all_tokens_and_change_nothing(name):
    vit = build(name)
    expected = expected_after_each_block(vit, first_tokens(vit))
    tomesd.apply_patch(vit.model, r=R)
    output, given = vit.output(), []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: given.append(tokens_of(out)))
    assert torch.equal(vit.output(), output)
    for got, want in zip(given, expected, strict=True):
        close(got, want)


@kinds
@torch.no_grad()
def test_a_hook_that_changes_each_token_changes_what_merged_from_it(name):
    vit = build(name)
    tomesd.apply_patch(vit.model, r=R)
    change, given = torch.randn(first_tokens(vit).shape), []

    def add(module, args, out):
        changed = tokens_of(out) + change
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    vit.blocks[1].register_forward_hook(add)
    vit.blocks[1].register_forward_hook(lambda module, args, out: given.append(tokens_of(out)))
    vit.blocks[2].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    vit.output()
    patch = next(m for m in vit.model.modules() if "_tomesd_patch" in m.__dict__)._tomesd_patch
    close(given[1], patch.forward.maps[2].merge(given[0]))


@of_timm
@torch.no_grad()
def test_intermediates_of_timm_have_all_tokens_at_every_index(name):
    vit = build(name)
    model, images = vit.model, vit.inputs["x"]
    expected = expected_after_each_block(vit, first_tokens(vit))
    plain = model.forward_intermediates(images)[1][0]
    tomesd.apply_patch(model, r=R)
    features = model.forward_features(images)
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, features)
    assert torch.equal(maps[0], plain)  # Nothing has merged in the first block.
    patches = [tokens[:, vit.prefix :] for tokens in expected]
    for got, want in zip(maps, patches, strict=True):
        close(got, want.transpose(1, 2).unflatten(2, (6, 6)))
    for index, want in enumerate(patches):
        (got,) = model.forward_intermediates(
            images, indices=[index], output_fmt="NLC", intermediates_only=True, stop_early=True
        )
        close(got, want)
        if hasattr(model, "get_intermediate_layers"):
            (got,) = model.get_intermediate_layers(images, n=[index], norm=True)
            close(got, model.norm(expected[index])[:, vit.prefix :])
    if not hasattr(model, "get_intermediate_layers"):
        return
    both = model.forward_intermediates(images, return_prefix_tokens=True, output_dict=True)
    for got, want in zip(both.get("image_intermediates_prefix", []), expected, strict=False):
        close(got, want[:, : vit.prefix])


@pytest.mark.parametrize("indices", [[0], [1], [0, 2], [1, 2]])
@pytest.mark.parametrize("patched_first", [True, False])
@of_timm
@torch.no_grad()
def test_feature_maps_of_timm_have_the_declared_shape(name, indices, patched_first):
    vit = build(name)
    images = vit.inputs["x"]
    expected = expected_after_each_block(vit, first_tokens(vit))
    if patched_first:
        tomesd.apply_patch(vit.model, r=R)
    net = FeatureGetterNet(vit.model, out_indices=list(indices))
    if not patched_first:
        tomesd.apply_patch(net, r=R[: indices[-1] + 1])
    maps = net(images)
    assert [x.shape[1] for x in maps] == net.feature_info.channels()
    for got, index in zip(maps, indices, strict=True):
        want = expected[index][:, vit.prefix :].transpose(1, 2).unflatten(2, (6, 6))
        close(got, want)


@of_timm
@torch.no_grad()
def test_feature_maps_that_timm_collects_with_hooks_have_all_tokens(name):
    vit = build(name)
    expected = expected_after_each_block(vit, first_tokens(vit))
    net = FeatureHookNet(vit.model, out_indices=(0, 1, 2))
    tomesd.apply_patch(net, r=R)
    for got, want in zip(net(vit.inputs["x"]), expected, strict=True):
        close(got, want)


@torch.no_grad()
def test_models_that_timm_creates_as_features_only_keep_the_declared_shape():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(6, 11))
    tomesd.apply_patch(model.eval(), r=7)
    assert [x.shape for x in model(torch.randn(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 2


@torch.no_grad()
def test_timm_backbones_of_transformers_have_all_tokens():
    torch.manual_seed(0)
    config = hf.TimmBackboneConfig(backbone="vit_tiny_patch16_224", out_indices=[3, 11])
    model = hf.TimmBackbone(config).eval()
    plain = model(images := torch.randn(1, 3, 224, 224)).feature_maps
    tomesd.apply_patch(model, r=[0] * 4 + [9] * 8)
    first, last = model(images).feature_maps
    assert torch.equal(first, plain[0])
    assert last.shape == plain[1].shape == (1, 192, 14, 14)
    assert len(last.flatten(2)[0].T.unique(dim=0)) == 196 - 72


@torch.no_grad()
def test_a_model_s_own_forward_may_collect_intermediates():
    class Dense(VisionTransformer):
        def forward(self, x):
            return self.forward_intermediates(x, intermediates_only=True)

    torch.manual_seed(0)
    model = Dense(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=2).eval()
    tomesd.apply_patch(model, r=9)
    assert [x.shape for x in model(torch.randn(1, 3, 24, 24))] == [(1, 24, 6, 6)] * 3


@kinds
@torch.no_grad()
def test_a_loop_over_the_blocks_gets_all_tokens_even_after_a_call_that_failed(name):
    vit, calls = build(name), []
    expected = expected_after_each_block(vit, first_tokens(vit))
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for block in vit.blocks
    ]
    vit.output()
    for hook in hooks:
        hook.remove()
    tomesd.apply_patch(vit.model, r=R)
    (name, right), *_ = vit.inputs.items()
    vit.inputs[name] = right[..., :-3].flatten(1)[..., None, None]  # Neither pictures nor sound.
    with pytest.raises((ValueError, RuntimeError, AssertionError, IndexError)):
        vit.output()
    x = calls[0][0][0]
    for block, (args, kwargs), want in zip(vit.blocks, calls, expected, strict=True):
        x = tokens_of(block(x, *args[1:], **kwargs))
        close(x, want)


@torch.no_grad()
def test_blocks_that_run_as_one_sequential_hand_on_merged_tokens():
    vit = build("timm")
    tomesd.apply_patch(vit.model, r=R)
    seen = []
    vit.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    vit.output()
    vit.model.forward_features(**vit.inputs)
    vit.model.train().set_grad_checkpointing()
    with torch.enable_grad():
        vit.output()
    assert seen == [32, 32, 32]


def gradients(vit: Vit) -> list[Tensor]:
    vit.model.zero_grad()
    final, maps = vit.model.forward_intermediates(vit.inputs["x"])
    (final.square().mean() + sum(x.sin().mean() for x in maps)).backward()
    return [p.grad.clone() for p in vit.model.parameters() if p.grad is not None]


def test_intermediates_train_the_same_with_gradient_checkpointing():
    vit = build("timm")
    vit.model.train()
    tomesd.apply_patch(vit.model, r=R)
    expected = gradients(vit)
    vit.model.set_grad_checkpointing()
    for got, want in zip(gradients(vit), expected, strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_unmerge_off_leaves_intermediates_merged():
    vit = build("timm")
    tomesd.apply_patch(vit.model, r=R, unmerge=False)
    maps = vit.model.forward_intermediates(
        vit.inputs["x"], output_fmt="NLC", intermediates_only=True
    )
    assert [x.shape[1] for x in maps] == [36, 31, 22]


@pytest.mark.parametrize("name", ["timm", "torchvision"])
@torch.no_grad()
def test_extractors_that_torch_fx_traces_are_refused(name):
    vit = build(name)
    node = "encoder.layers.encoder_layer_1" if name == "torchvision" else "blocks.1"
    tomesd.apply_patch(vit.model, r=R)
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace .* forward hook on the blocks"):
        create_feature_extractor(vit.model, [f"{node}.add_1"])


@torch.no_grad()
def test_extractors_that_were_traced_before_are_refused():
    vit = build("torchvision")
    extractor = create_feature_extractor(vit.model, ["encoder.layers.encoder_layer_1.add_1"])
    extractor(vit.inputs["x"])
    tomesd.apply_patch(vit.model, r=R)
    for run in (lambda: None, vit.output):
        run()
        with pytest.raises(RuntimeError, match="block 0 of a patched Vision Transformer must be"):
            extractor(vit.inputs["x"])


@slow
@torch.no_grad()
def test_intermediates_compile_to_one_graph_with_merging():
    vit = build("timm")
    net = FeatureGetterNet(vit.model, out_indices=[0, 1, 2])
    tomesd.apply_patch(net, r=R)
    expected = net(vit.inputs["x"])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for got, want in zip(compiled(vit.inputs["x"]), expected, strict=True):
        close(got, want)
