"""ComfyUI's transformers merge for one clone of a model: stand-ins with its calling conventions.

The reference for a block is that of test_reference.py: the host's own block, on all tokens, with
the mean of its group and the position of its head for each.
"""

import pytest
import torch
from torch import Tensor, nn

import tomesd
from tests.support import slow_reference, stand_in_comfyui
from tests.support import stand_in_transformers as comfyui
from tests.support.slow import slow
from tests.support.stand_in_transformers import TRANSFORMERS

H, W = 9, 16  # Latents: patches are of 2×2, so 5×8 tokens of which 40 % merge.
RATIO = 0.4
TEXT = 5


def _draw(*shape) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _inputs(name: str, batch: int = 2, beside: str = "") -> dict:
    key = "timesteps" if name == "SD3" else "timestep"
    frames = {"Wan": (3,), "Qwen-Image": (1,)}.get(name, ())
    given = {
        "x": _draw(batch, 4, *frames, H, W),
        key: torch.full((batch,), 500.0),
        "context": _draw(batch, TEXT, comfyui.WIDTH),
    }
    if beside == "reference images":
        given["ref_latents"] = [_draw(batch, 4, *frames, 8, 6)]
    if beside == "a mask":
        per_pair = _draw(batch, TEXT + 40, TEXT + 40)
        padded = torch.tensor([[1.0] * (TEXT - 1) + [0.0]]).expand(batch, -1)
        given["attention_mask"] = per_pair if name == "Flux" else padded
    if beside == "timesteps of frames":
        given[key] = torch.tensor([[0.0, 500, 500]]).expand(batch, -1)
    return given


@torch.no_grad()
def _call(model: nn.Module, inputs: dict) -> Tensor:
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return model(**given, transformer_options={})


@pytest.fixture(params=TRANSFORMERS)
def name(request):
    return request.param


@pytest.mark.parametrize("settings", [{}, {"across_frames": True}, {"method": "prune"}], ids=str)
def test_it_merges_at_every_batch_and_is_left_bit_for_bit_as_it_was(name, settings):
    model = comfyui.build(TRANSFORMERS[name])
    for batch in (1, 3):
        inputs = _inputs(name, batch)
        before = _call(model, inputs)
        with tomesd.patched(model, ratio=0.5, **settings):
            merged = _call(model, inputs)
            assert torch.equal(_call(model, inputs), merged)
        assert merged.shape == before.shape
        assert merged.isfinite().all()
        assert not torch.equal(merged, before)
        assert torch.equal(_call(model, inputs), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def _groups(x: Tensor, grids, text: int) -> list[list[int]]:
    """Of one sample's tokens [text + images, C], heads first; text merges with nothing."""
    groups = [[token] for token in range(text)]
    start = text
    for frames, h, w in grids:
        for _ in range(frames):
            destinations = [y * w + x for y in range(0, h, 2) for x in range(0, w, 2)]
            sources = [token for token in range(h * w) if token not in destinations]
            tokens = x[start : start + h * w].tolist()
            found = slow_reference.bipartite_soft_matching(
                tokens, sources, destinations, int(RATIO * h * w)
            )
            groups += [[start + token for token in group] for group in found]
            start += h * w
    return groups


def _levelled(value: Tensor, groups: list, dim: int, mean: bool) -> Tensor:
    """The mean of its group, or the entry of its head, for each token."""
    value = value.expand(len(groups), *value.shape[1:]).clone()
    for sample, of_sample in zip(value, groups, strict=True):
        rows = sample.movedim(dim - 1, 0)
        offset = len(rows) - sum(map(len, of_sample))  # Text tokens, if they are elsewhere.
        before = rows.clone()
        for group in of_sample:
            places = [offset + token for token in group]
            rows[places] = before[places].mean(0) if mean else before[places[0]]
    return value


CASES = [
    *((name, "") for name in TRANSFORMERS),
    ("Flux", "reference images"),
    ("Flux", "a mask"),
    ("Qwen-Image", "reference images"),
    ("Qwen-Image", "a mask"),
    ("Wan", "timesteps of frames"),
]


@pytest.mark.parametrize(("name", "beside"), CASES)
@torch.no_grad()
def test_a_block_attends_to_merged_tokens_as_the_hosts_own_to_equal_tokens(name, beside):
    model, inputs = comfyui.build(TRANSFORMERS[name]), _inputs(name, beside=beside)
    tomesd.apply_patch(model, ratio=RATIO, window=0)
    found: list[tuple] = []

    def note(block, args, kwargs):
        copy = (
            tuple(x.clone() for x in args),
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )
        found.append((block, *copy))

    def keep(block, args, output):
        outputs = output if isinstance(output, tuple) else (output,)
        found[-1] += ([each.clone() for each in outputs],)

    kinds = {block: hooks.kind for block, hooks in model._tomesd_patch.blocks.items()}
    names = {block: hooks.names for block, hooks in model._tomesd_patch.blocks.items()}
    for block in kinds:
        block.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
        block.register_forward_hook(keep)
    _call(model, inputs)
    grids = model._tomesd_patch.hooks.last.grids
    tomesd.remove_patch(model)
    assert len(found) == len(kinds)
    for block, args, kwargs, outputs in found:
        block._forward_hooks.clear()
        block._forward_pre_hooks.clear()
        kind = kinds[block]
        given = dict(zip(names[block], args, strict=False)) | kwargs
        x = given[kind.tokens]
        together = kind.text is not None and not kind.text.argument
        groups = [_groups(sample, grids, TEXT if together else 0) for sample in x]
        assert any(len(group) > 1 for group in groups[0])
        means = _levelled(x, groups, 1, mean=True)
        given[kind.tokens] = means.clone()
        if kind.rotary:
            table = given[kind.rotary.argument]
            dim = 1 if table.shape[1] > 1 else 2
            given[kind.rotary.argument] = _levelled(table, groups, dim, mean=False)
        if kind.mask and given.get(kind.mask) is not None:
            mask = _levelled(given[kind.mask], groups, 1, mean=False)
            given[kind.mask] = _levelled(mask, groups, 2, mean=False)
        by_position = [given.pop(argument) for argument in names[block][: len(args)]]
        reference = block(*by_position, **given)
        reference = reference if isinstance(reference, tuple) else (reference,)
        for i, (got, want) in enumerate(zip(outputs, reference, strict=True)):
            added = x - means if i == (kind.output or 0) else 0
            torch.testing.assert_close(got, want + added, rtol=1e-5, atol=2e-5)


@pytest.fixture
def clones(name):
    """Two clones of one model, of which the second merges, and how to sample from one."""
    patcher = stand_in_comfyui.build(model=comfyui.build(TRANSFORMERS[name]))
    frames = {"Wan": 3, "Qwen-Image": 1}.get(name)
    return patcher, tomesd.apply_patch(patcher.clone(), ratio=0.5), lambda p: _sample(p, frames)


def _sample(patcher, frames):
    return stand_in_comfyui.sample(patcher, steps=2, h=H, w=W, frames=frames)


def test_one_clone_merges_and_the_others_do_not(clones):
    patcher, clone, sample = clones
    plain = sample(patcher)
    merged = sample(clone)
    assert not torch.equal(merged, plain)
    assert torch.equal(sample(patcher), plain)
    assert torch.equal(sample(clone.clone()), merged)
    (rows,) = tomesd.report(clone).rows.values()
    assert {row.note for row in rows} == {""}
    assert all(row.merged < row.tokens for row in rows)
    assert torch.equal(sample(tomesd.remove_patch(clone)), plain)


@pytest.mark.parametrize("ratio", [0.5, tomesd.RatioSchedule.first(0.5, until=0.9)])
def test_clones_take_turns_in_one_sampling(name, clones, ratio):
    """As with guiders that have two models."""
    patcher, clone, _ = clones
    tomesd.apply_patch(clone, ratio)
    inputs = _inputs(name)
    sigmas = torch.tensor([5.0, 0.0])

    @torch.no_grad()
    def denoised(one):
        options = {"sample_sigmas": sigmas, "wrappers": one.wrappers}
        return patcher.model.apply_model(
            inputs["x"], sigmas[:1].repeat(2), None, inputs["context"], None, options
        )

    plain, merged = denoised(patcher), denoised(clone)
    assert not torch.equal(plain, merged)
    assert torch.equal(denoised(patcher), plain)
    assert torch.equal(denoised(clone), merged)


def test_nodes_around_a_block_get_every_token(name, clones):
    _, clone, sample = clones
    merged = sample(clone)
    seen = set()

    def node(args, extra):
        seen.add(args["img"].shape[1])
        return extra["original_block"](args)

    options = clone.model_options["transformer_options"]
    kinds = {("double_block", 0), ("single_block", 1)} if name == "Flux" else {("double_block", 1)}
    options["patches_replace"] = {"dit": dict.fromkeys(kinds, node)}
    assert torch.equal(sample(clone), merged)
    assert seen == {"Flux": {40, 45}, "Wan": {120}}.get(name, {40})


def test_a_node_inside_of_a_block_gets_every_token_and_the_report_says_so(clones):
    patcher, clone, sample = clones
    plain = sample(patcher)
    options = clone.model_options["transformer_options"]
    options["patches"] = {"attn1_patch": [lambda *args: args[0]]}
    assert torch.equal(sample(clone), plain)
    assert "patches of others see its tokens: attn1_patch" in str(tomesd.report(clone))


def test_an_attention_function_of_another_node_stays_and_the_report_says_so(clones):
    _, clone, sample = clones
    merged = sample(clone)

    def override(function, *args, mask=None, **options):
        assert mask is None
        return function(*args, **options)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    assert not torch.equal(sample(clone), merged)
    assert "another extension replaces its attention function" in str(tomesd.report(clone))


@pytest.mark.parametrize("name", ["Flux"], indirect=True)
def test_a_kernel_that_takes_no_bias_gets_none_and_the_report_says_so(clones, monkeypatch):
    _, clone, sample = clones
    merged = sample(clone)

    def attention_flash(q, k, v, heads, mask=None, **options):
        assert mask is None
        return stand_in_comfyui.attention_pytorch(q, k, v, heads)

    monkeypatch.setattr(stand_in_comfyui, "optimized_attention_masked", attention_flash)
    assert not torch.equal(sample(clone), merged)
    assert "without proportional attention: attention_flash takes no bias" in str(
        tomesd.report(clone)
    )


def test_forges_flux_merges_for_one_clone_without_proportional_attention():
    kind = type("IntegratedFluxTransformer2DModel", (comfyui.Flux,), {})
    kind.__module__ = "backend.nn.flux"
    patcher = stand_in_comfyui.build(stand_in_comfyui.ForgePatcher, model=comfyui.build(kind))
    plain = _sample(patcher, None)
    clone = tomesd.apply_patch(patcher.clone(), ratio=0.5)
    assert not torch.equal(_sample(clone, None), plain)
    assert torch.equal(_sample(patcher, None), plain)
    assert "without proportional attention: its processors take no bias" in str(
        tomesd.report(clone)
    )


def test_frames_with_timesteps_of_their_own_do_not_merge_across_frames():
    model, inputs = comfyui.build(comfyui.WanModel), _inputs("Wan", beside="timesteps of frames")
    plain = _call(model, inputs)
    tomesd.apply_patch(model, across_frames=True)
    assert torch.equal(_call(model, inputs), plain)
    assert "its frames have timesteps of their own" in str(tomesd.report(model))


def test_a_block_with_other_tokens_than_those_of_its_grids_is_a_clear_error():
    model = tomesd.apply_patch(comfyui.build(comfyui.WanModel))
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0][:, :-1],), prepend=True)
    with pytest.raises(ValueError, match="x of block 0 must have the tokens of the grids"):
        _call(model, _inputs("Wan"))


REFUSED = [
    (comfyui.HumoWanModel, TypeError, "must not be a HumoWanModel: each of its tokens attends to"),
    (
        comfyui.WanModelOfTomorrow,
        ValueError,
        "known are WanModel, CameraWanModel, Animate",
    ),
    (nn.Identity, TypeError, "must have one of Chroma, Flux, .* WanModel, got one with a Identity"),
]


@pytest.mark.parametrize(("kind", "error", "why"), REFUSED)
def test_a_model_of_comfyui_that_does_not_merge_is_refused_with_the_reason(kind, error, why):
    patcher = stand_in_comfyui.build(model=kind())
    with pytest.raises(error, match=why):
        tomesd.apply_patch(patcher)


@slow
@torch.no_grad()
def test_it_compiles_to_one_graph(name):
    model, inputs = tomesd.apply_patch(comfyui.build(TRANSFORMERS[name])), _inputs(name)
    eager = _call(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_call(compiled, inputs), eager, rtol=1e-4, atol=1e-4)
