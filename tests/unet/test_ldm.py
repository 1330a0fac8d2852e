"""The original UNet merges as diffusers' does: CompVis's own class, and ComfyUI's conventions."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests.support import slow_reference, tiny_ldm
from tests.support import stand_in_comfyui as comfyui
from tests.support.slow import slow
from tests.support.tiny_ldm import BUILD, call

H, W = 6, 10
N = H * W
RATIO = 0.4
WAYS = [
    {},
    {"merge_attn": True, "merge_crossattn": True, "merge_mlp": True},
    {"preset": "quality"},
]


@pytest.fixture(params=BUILD)
def model(request):
    return BUILD[request.param]()


@pytest.fixture
def maskless(monkeypatch):
    """A kernel of ComfyUI that takes no mask."""
    monkeypatch.setattr(comfyui, "optimized_attention_masked", comfyui.attention_sub_quad)


@pytest.fixture(autouse=True)
def _one_precision(monkeypatch):
    """CompVis's attention casts queries and keys to float32, but not values: no float64 then."""
    with contextlib.suppress(ImportError):
        import ldm.modules.attention

        monkeypatch.setattr(ldm.modules.attention, "_ATTN_PRECISION", "as it is")


def _calls(model, context=..., **settings) -> list[tuple[nn.Module, Tensor, dict]]:
    """The merging blocks of a model that is patched now, their tokens and other arguments."""
    found = []

    def note(block, args, kwargs) -> None:
        given = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        found.append((block, args[0].double(), given))

    tomesd.apply_patch(model, **settings)
    handles = [
        block.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
        for block in model._tomesd_patch.blocks
    ]
    with torch.no_grad():
        call(model, h=H, w=W, context=context)
    for handle in handles:
        handle.remove()
    model.double()
    assert found
    return found


def _run(block, x, given) -> Tensor:
    # Blocks may add in place.
    return block(x.clone(), **given)


@pytest.mark.parametrize("settings", [*WAYS, {"preset": "paper"}], ids=str)
@torch.no_grad()
def test_it_merges_at_every_size_and_batch_and_is_left_bit_for_bit_as_it_was(model, settings):
    # The second level of the last one has 5×7 tokens. CompVis's own takes even sizes only.
    for batch, (h, w) in ((1, (8, 8)), (2, (6, 10)), (3, (10, 14))):
        before = call(model, batch, h, w)
        with tomesd.patched(model, **{"ratio": 0.5, "max_downsample": 8} | settings):
            merged = call(model, batch, h, w)
            assert torch.equal(call(model, batch, h, w), merged)
        assert merged.isfinite().all()
        assert not torch.equal(merged, before)
        assert torch.equal(call(model, batch, h, w), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not any("tomesd" in name for name in vars(module))


@torch.no_grad()
def test_a_block_adds_to_each_token_what_the_hosts_own_adds_to_its_group(model):
    found = _calls(model, ratio=RATIO, window=0, prop_attn=False)
    outputs = [_run(*each) for each in found]
    tomesd.remove_patch(model)
    destinations = [y * W + x for y in range(0, H, 2) for x in range(0, W, 2)]
    sources = [token for token in range(N) if token not in destinations]
    for (block, x, given), got in zip(found, outputs, strict=True):
        groups = [
            slow_reference.bipartite_soft_matching(
                sample.tolist(), sources, destinations, int(RATIO * N)
            )
            for sample in x
        ]
        merged = torch.stack(
            [
                torch.stack([sample[group].mean(0) for group in of_sample])
                for sample, of_sample in zip(x, groups, strict=True)
            ]
        )
        added = _run(block, merged, given) - merged
        want = x.clone()
        for sample, of_sample in enumerate(groups):
            for index, group in enumerate(of_sample):
                want[sample, group] += added[sample, index]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@torch.no_grad()
def _merging_equal_tokens_changes_nothing(model, settings, context=...) -> None:
    found = _calls(model, context, **settings | {"ratio": 0.5, "max_downsample": 1})
    for _, x, _ in found:
        # The four tokens of a cell are equal: of 15 cells, half of the tokens merge into groups of
        # up to four.
        cells = x.unflatten(1, (H, W))
        cells[:, 1::2] = cells[:, ::2]
        cells[:, :, 1::2] = cells[:, :, ::2]
    merged = [_run(*each) for each in found]
    tomesd.remove_patch(model)
    for each, got in zip(found, merged, strict=True):
        # The matching's own sums are float32.
        torch.testing.assert_close(got, _run(*each), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_merging_tokens_that_are_equal_changes_nothing(model, settings):
    """Which takes proportional attention: a key that stands for several counts as many."""
    _merging_equal_tokens_changes_nothing(model, settings)


@pytest.mark.parametrize("settings", WAYS[:2], ids=str)
def test_merging_equal_tokens_changes_nothing_with_a_kernel_that_takes_no_mask(settings, maskless):
    _merging_equal_tokens_changes_nothing(BUILD["ComfyUI's stand-in"](), settings)


@pytest.mark.parametrize("settings", WAYS[:2], ids=str)
def test_without_a_context_cross_attention_is_proportional_too(settings):
    model = tiny_ldm.compvis(context_dim=32, channel_mult=[1])
    _merging_equal_tokens_changes_nothing(model, settings, context=None)


def test_a_host_that_replaces_the_attentions_forward_gets_keys_of_all_tokens(monkeypatch):
    """As the WebUIs do, whose functions ignore masks."""
    model = tiny_ldm.compvis()
    kind = type(next(m for m in model.modules() if type(m).__name__ == "CrossAttention"))
    seen = []

    def forward(self, x, context=None, mask=None):
        assert mask is None
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        seen.append((q.shape, k.shape))
        return self.to_out(comfyui.attention_pytorch(q, k, v, self.heads))

    monkeypatch.setattr(kind, "forward", forward)
    _merging_equal_tokens_changes_nothing(model, {})
    assert ((2, N // 2, 32), (2, N, 32)) in [tuple(map(tuple, shapes)) for shapes in seen]


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_gradients_are_the_same_with_checkpointing(settings):
    found = []
    for checkpointing in (False, True):
        model = tiny_ldm.compvis(use_checkpoint=checkpointing).train()
        tomesd.apply_patch(model, **{"ratio": 0.5, "max_downsample": 8} | settings)
        with torch.random.fork_rng():
            call(model).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_blocks_keep_no_map_without_gradients(model):
    tomesd.apply_patch(model)
    with torch.no_grad():
        call(model)
    assert all(hooks.recent is None for hooks in model._tomesd_patch.blocks.values())


@torch.no_grad()
def test_the_model_object_around_it_is_taken_too(model):
    before = call(model)
    whole = tiny_ldm.LatentDiffusion(model)
    assert tomesd.apply_patch(whole, ratio=0.5) is whole
    assert not torch.equal(call(model), before)
    assert "1/1 input_blocks.1" in str(tomesd.report(whole))
    tomesd.remove_patch(whole)
    assert torch.equal(call(model), before)


@torch.no_grad()
def test_the_report_names_every_level_and_what_a_kernel_without_masks_saves(maskless):
    model = tomesd.apply_patch(tiny_ldm.stand_in(), ratio=0.5)
    call(model, h=8, w=8)
    rows = {row.where: row for row in tomesd.report(model).rows["UNetModel"]}
    assert list(rows)[:3] == ["1/1 input_blocks.1", "1/2 input_blocks.3", "1/2 middle_block"]
    fine, coarse = rows["1/1 input_blocks.1"], rows["1/2 middle_block"]
    assert (fine.blocks, fine.tokens, fine.merged, fine.work) == (2, 64, 32, 0.5)
    assert (coarse.tokens, coarse.note) == (16, "coarser than max_downsample=1")


@torch.no_grad()
def test_patches_of_others_in_a_block_see_every_token_and_self_attention_merges():
    patcher = comfyui.build()
    plain = comfyui.sample(patcher)
    seen = []

    def other(q, k, v, options):
        seen.append(q.shape[1])
        return comfyui.attention_pytorch(q, k, v, comfyui.HEADS)

    for settings in ({}, {"merge_attn": True}):
        seen.clear()
        clone = patcher.clone()
        clone.set_model_attn2_replace(other, "input", 1)
        torch.testing.assert_close(comfyui.sample(clone), plain)
        tomesd.apply_patch(clone, **settings)
        assert not torch.equal(comfyui.sample(clone), plain)
        assert set(seen) == {140}
    tomesd.apply_patch(clone)
    comfyui.sample(clone)
    assert "self-attention only, beside patches of others: attn2" in str(tomesd.report(clone))


@torch.no_grad()
def test_an_attention_function_of_others_gets_no_mask():
    patcher = comfyui.build()

    def override(function, q, k, v, heads, mask=None):
        assert mask is None
        return function(q, k, v, heads)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = override
    plain = comfyui.sample(patcher)
    tomesd.apply_patch(patcher)
    assert not torch.equal(comfyui.sample(patcher), plain)


def test_a_kernel_without_masks_is_refused_where_only_keys_merge(maskless):
    with pytest.raises(ValueError, match="prop_attn must be False with merge_queries=False"):
        tomesd.apply_patch(tiny_ldm.stand_in(), preset="quality")
    tomesd.apply_patch(tiny_ldm.stand_in(), preset="quality", prop_attn=False)


def test_a_mask_on_self_attention_is_refused():
    model = tomesd.apply_patch(tiny_ldm.stand_in())
    attn = model.input_blocks[1][1].transformer_blocks[0].attn1
    attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"mask": torch.zeros(1)}),
        with_kwargs=True,
        prepend=True,
    )
    with pytest.raises(ValueError, match="mask on self-attention cannot be combined"):
        call(model)


def test_one_without_spatial_transformers_is_refused():
    model = tiny_ldm.compvis(use_spatial_transformer=False, context_dim=None)
    with pytest.raises(ValueError, match="nothing would be merged in UNetModel: it has no atten"):
        tomesd.apply_patch(model)


def test_a_class_of_the_same_name_with_other_parts_is_a_clear_error():
    model = type("UNetModel", (nn.Module,), {})()
    with pytest.raises(TypeError, match="model must be a UNetModel with the same parts"):
        tomesd.apply_patch(model)


@slow
@torch.no_grad()
def test_it_compiles_to_one_graph():
    model = tomesd.apply_patch(tiny_ldm.stand_in(), ratio=0.5, max_downsample=8)
    eager = call(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(compiled), eager, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_copy_or_pickle_of_a_patched_model_merges_by_itself(model):
    tomesd.apply_patch(model, ratio=0.5)
    merged = call(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tomesd.remove_patch(model)
        assert torch.equal(call(copied), merged)
        plain = call(model)
        tomesd.remove_patch(copied)
        assert torch.equal(call(copied), plain)
        tomesd.apply_patch(model, ratio=0.5)


@torch.no_grad()
def test_it_merges_under_autocast(model):
    exact = call(tomesd.apply_patch(model, ratio=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        half = call(model)
    assert (half.float() - exact).norm() < 0.1 * exact.norm()
