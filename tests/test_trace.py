"""tomesd.trace tells which input tokens became one, and changes nothing."""

import pytest
import torch

import tomesd
from tests.support.recorders import count_hooks
from tests.support.slow import slow
from tests.support.tiny_model import WIDTH
from tests.support.tiny_pipelines import sd_pipeline
from tests.support.tiny_unets import predict, sd_unet, unet_inputs
from tests.support.tiny_vits import FAMILIES, SPEECH, Vit, build
from tests.support.vit_reference import encode

R = [3, 0, 9]

GRIDS = {
    "AST": (4, 6),  # 16 frequencies and 24 times, in patches of 4×4.
    "SigLIP 2": (36,),  # Its pictures come as a row of patches.
    "Whisper": (36,),
    "ViViT": (2, 3, 3),
    "VideoMAE": (2, 3, 3),  # 4 frames, two in each patch.
    "V-JEPA 2": (2, 3, 3),
    "RADIO": (36,),  # Its patches are cut out as a row.
    **dict.fromkeys(SPEECH, (37,)),
    "ViTMAE": (27,),  # It sees three quarters of 36 patches, in random order.
}


def together(group: list[int]) -> set[frozenset[int]]:
    """Which tokens are one, whatever the groups' numbers."""
    return {frozenset(i for i, g in enumerate(group) if g == label) for label in group}


def traced_run(vit: Vit, **settings) -> list[tomesd.TokenGroups]:
    tomesd.apply_patch(vit.model, **settings)
    with tomesd.trace(vit.model) as traced:
        vit.output()
    return traced


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_groups_of_every_layer_are_those_of_the_reference(name):
    vit = build(name)
    seen = {}
    vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0]))
    traced = traced_run(vit, r=R)
    first = seen["first"]
    tomesd.remove_patch(vit.model)
    assert [record.where for record in traced] == ["layer 0", "layer 1", "layer 2"]
    assert {record.step for record in traced} == {0}
    for layer, record in enumerate(traced):
        schedule = [r if i <= layer else 0 for i, r in enumerate(R)]
        for tokens, got in zip(first, record.group.tolist(), strict=True):
            _, groups = encode(tokens, vit.reference, schedule, vit.prefix, suffix=vit.suffix)
            assert together(got) == {frozenset(members) for members in groups}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_patches_lie_in_their_grid_and_prefix_tokens_stay_separate(name):
    vit = build(name)
    last = traced_run(vit, r=3)[-1]
    grid = GRIDS.get(name, (6, 6))
    assert last.grid == grid
    assert last.patches.shape == (len(last.group), *grid)
    assert last.prefix == vit.prefix
    end = last.group.shape[1] - vit.suffix
    assert torch.equal(last.patches.flatten(1), last.group[:, vit.prefix : end])
    for group in last.group.tolist():
        assert all(group.count(group[i]) == 1 for i in range(vit.prefix))


@pytest.mark.parametrize("where", [(0, 2, 2), (1, 4, 0)])
@torch.no_grad()
def test_a_patch_is_found_at_the_place_where_it_was_seen(where):
    sample, row, column = where
    vit = build("timm", pos_embed="none")
    generator = torch.Generator().manual_seed(1)
    tile = torch.randn(3, 4, 4, generator=generator)
    image = vit.inputs["x"]
    # Two patches that look the same merge first, one even and one odd: there are no positions.
    for y, x in ((0, 1), (row, column)):
        image[sample, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = tile
    patches = traced_run(vit, r=[1, 0, 0])[0].patches[sample]
    assert patches[0, 1] == patches[row, column]
    assert patches.unique().numel() == 35


@torch.no_grad()
def test_the_grid_is_that_of_the_input_not_of_the_models_own_size():
    vit = build("timm", dynamic_img_size=True)
    vit.inputs = {"x": torch.randn(1, 3, 16, 32)}
    assert traced_run(vit, r=3)[-1].grid == (4, 8)


@torch.no_grad()
def test_every_forward_is_a_step_of_its_own():
    vit = build("ViT")
    tomesd.apply_patch(vit.model, r=3)
    with tomesd.trace(vit.model) as traced:
        vit.output()
        vit.inputs["pixel_values"] = vit.inputs["pixel_values"].flip(-1)
        vit.output()
    assert [record.step for record in traced] == [0, 0, 0, 1, 1, 1]
    assert not torch.equal(traced[2].group, traced[5].group)


def test_what_gradient_checkpointing_computes_again_is_recorded_once():
    vit = build("ViT")
    vit.model.train()
    vit.model.gradient_checkpointing_enable({"use_reentrant": False})
    tomesd.apply_patch(vit.model, r=3)
    with tomesd.trace(vit.model) as traced:
        vit.output().square().mean().backward()
    assert len(traced) == 3

    unet = sd_unet().train()
    unet.enable_gradient_checkpointing()
    tomesd.apply_patch(unet, 0.5)
    with tomesd.trace(unet) as traced:
        unet(**unet_inputs(unet)).sample.square().mean().backward()
    assert len({(record.step, record.where) for record in traced}) == len(traced) == 3


@torch.no_grad()
def test_settings_may_change_while_tracing_and_what_merges_nothing_leaves_no_record():
    vit = build("timm")
    tomesd.apply_patch(vit.model, r=0)
    counts = []
    with tomesd.trace(vit.model) as traced:
        for change in ({"r": 0}, {"r": 2}, None, {"r": 4}):
            tomesd.apply_patch(vit.model, **change) if change else tomesd.remove_patch(vit.model)
            vit.output()
            counts.append(len(traced))
    assert counts == [0, 3, 3, 6]
    assert [traced[i].group[0].unique().numel() for i in (2, 5)] == [37 - 6, 37 - 12]


@torch.no_grad()
def test_dropped_tokens_are_minus_one():
    unet = tomesd.apply_patch(sd_unet(), 0.5, method="prune")
    with tomesd.trace(unet) as traced:
        predict(unet)
    dropped = (traced[0].patches == -1).flatten(1).sum(1)
    assert dropped.tolist() == [traced[0].patches[0].numel() // 2] * 2


@torch.no_grad()
def test_tracing_changes_no_output_and_leaves_no_hook():
    vit, unet = build("ViT"), sd_unet()
    tomesd.apply_patch(vit.model, r=3)
    tomesd.apply_patch(unet, 0.5, use_rand=True)
    expected = vit.output(), predict(unet)
    count = count_hooks(vit.model), count_hooks(unet)
    with tomesd.trace(vit.model), tomesd.trace(unet):
        assert torch.equal(vit.output(), expected[0])
        assert torch.equal(predict(unet), expected[1])
    with pytest.raises(KeyboardInterrupt), tomesd.trace(vit.model):
        raise KeyboardInterrupt
    assert (count_hooks(vit.model), count_hooks(unet)) == count
    assert torch.equal(vit.output(), expected[0])


@slow
@torch.no_grad()
def test_compiled_models_are_traced_too():
    vit = build("timm")
    tomesd.apply_patch(vit.model, r=R)
    compiled = torch.compile(vit.model, fullgraph=True, backend="eager")
    expected = compiled(**vit.inputs)
    with tomesd.trace(compiled) as traced:
        torch.testing.assert_close(compiled(**vit.inputs), expected)
    assert len(traced) == 3
    assert traced[-1].group.shape == (2, 37)


@torch.no_grad()
def test_every_step_and_block_of_a_pipeline_is_recorded_with_its_grid():
    pipe = sd_pipeline()
    tomesd.apply_patch(pipe, 0.5, max_downsample=2, use_rand=True)
    with tomesd.trace(pipe) as traced:
        pipe("a heart", num_inference_steps=3, width=80, height=48)
    # Classifier-free guidance computes two samples; latents are an eighth of the picture.
    fine = [r for r in traced if r.grid == (6, 10)]
    coarse = [r for r in traced if r.grid == (3, 5)]
    assert len(fine) + len(coarse) == len(traced)
    assert {record.model for record in traced} == {"unet"}
    wheres = {record.where for record in traced}
    assert all(hasattr(pipe.unet.get_submodule(where), "attn1") for where in wheres)
    assert [r.step for r in traced] == sorted([0, 1, 2] * len(wheres))
    for record in fine:
        assert record.prefix == 0
        assert record.patches.shape == (2, 6, 10)
        assert [group.unique().numel() for group in record.group] == [30, 30]
    assert not torch.equal(fine[0].group, fine[-1].group)


@torch.no_grad()
def test_a_blocks_groups_are_those_that_its_attention_ran_on():
    unet = sd_unet()
    tomesd.apply_patch(unet, 0.5, merge_attn=True, prop_attn=False, sx=1, sy=2)
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen = []
    attn.register_forward_hook(lambda module, args, output: seen.append(output))
    with tomesd.trace(unet) as traced:
        inputs = unet_inputs(unet, h=4, w=6)
        inputs["encoder_hidden_states"] = torch.zeros(2, 3, WIDTH)
        unet(**inputs)
    (unmerged,) = seen
    for outputs, group in zip(unmerged, traced[0].group.tolist(), strict=True):
        same = [outputs.eq(token).all(-1).nonzero().flatten().tolist() for token in outputs]
        assert {frozenset(tokens) for tokens in same} == together(group)


def test_a_model_without_a_patch_is_refused():
    with (
        pytest.raises(ValueError, match="model must be patched, got a UNet2DConditionModel"),
        tomesd.trace(sd_unet()),
    ):
        pass
