"""What merging saves and costs is known from shapes alone, and rightly."""

from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tomesd
from tests.support.tiny_model import WIDTH
from tests.support.tiny_unets import SD_TEXT_TOKENS, sd_unet, unet_inputs
from tomesd.core import cost, merging_work, workload
from tomesd.core.workload import Branches
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.settings import DiffusionSettings

BATCH = 2

ROOM = {
    "batch": st.integers(1, 4),
    "tokens": st.integers(4, 5000),
    "channels": st.sampled_from([8, 64, 320, 1280]),
    "kind": st.sampled_from(["cpu", "cuda", "mps"]),
    "branches": st.builds(Branches, st.just(True), *[st.booleans()] * 4),
}


@pytest.mark.parametrize(("tokens", "channels", "text"), [(64, 32, 12), (48, 64, 7), (1, 16, 1)])
def test_a_block_s_flops_are_those_that_torch_counts(tokens, channels, text):
    with torch.device("meta"):
        block = BasicTransformerBlock(channels, 2, channels // 2, cross_attention_dim=24)
        x, prompt = torch.empty(BATCH, tokens, channels), torch.empty(BATCH, text, 24)
    with FlopCounterMode(display=False) as counter:
        block(x, encoder_hidden_states=prompt)
    work = workload.block(BATCH, tokens, channels, text_tokens=text, text_channels=24)
    assert workload.flops(work) == counter.get_total_flops()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge_queries": False, "ratio": 0.75},
        {"merge_crossattn": True, "merge_mlp": True, "ratio": 0.3},
        {"merge_attn": False, "merge_mlp": True},
        {"merge_block": True},
        {"max_downsample": 8},
        {"window": 8},
        {"window": 0},
        {"refine": 2, "ratio": 0.75},
    ],
)
def test_a_patched_unet_saves_and_spends_the_flops_that_the_model_says(settings):
    unet = sd_unet().to("meta")
    chosen = DiffusionSettings(**{"merge_block": False, "max_downsample": 1} | settings)
    tomesd.apply_patch(unet, **asdict(chosen))
    saved = 0
    levels = ((16, 16, 3), (8, 32, 3), (4, 32, 1))
    for side, channels, blocks in levels if chosen.max_downsample > 1 else levels[:1]:
        at = (BATCH, side * side, channels)
        text = {"text_tokens": SD_TEXT_TOKENS, "text_channels": WIDTH}
        branches = Branches(
            merge_attn=chosen.merge_attn,
            merge_crossattn=chosen.merge_crossattn,
            merge_mlp=chosen.merge_mlp,
            merge_queries=chosen.merge_queries,
            merge_block=chosen.merge_block,
        )
        r = Matcher(chosen).merged(chosen.ratio, side, side)
        less = workload.block(*at, r=r, branches=branches, **text)
        window, refine = chosen.window or None, chosen.refine
        own = merging_work.patch(*at, r, branches=branches, window=window, refine=refine)
        gain = (
            workload.flops(workload.block(*at, **text)) - workload.flops(less) - workload.flops(own)
        )
        saved += blocks * gain
    assert _unpatched_flops() - _unet_flops(unet) == saved


@cache
def _unpatched_flops() -> int:
    return _unet_flops(sd_unet().to("meta"))


def _unet_flops(unet) -> int:
    inputs = {name: x.to("meta") for name, x in unet_inputs(unet, BATCH, 16, 16).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    return counter.get_total_flops()


def test_the_operators_that_are_charged_for_are_those_that_are_called():
    matcher, x = Matcher(DiffusionSettings()), torch.randn(2, 16, 8)
    made = matcher.token_map(x, 4, 4, 0.5, None)
    merged = made.merge(x)
    refined, norms = Matcher(DiffusionSettings(refine=2)), merging_work.PYTORCH.norms
    for charged, call in (
        (merging_work.PYTORCH.match, lambda: matcher.token_map(x, 4, 4, 0.5, None)),
        (
            merging_work.PYTORCH.match + 2 * merging_work.PYTORCH.refine,
            lambda: refined.token_map(x, 4, 4, 0.5, None),
        ),
        (merging_work.PYTORCH.merge, lambda: made.merge(x)),
        (merging_work.PYTORCH.merge + norms, lambda: made.merge(x, how="direction")),
        (merging_work.PYTORCH.unmerge, lambda: made.unmerge(merged)),
    ):
        with _Calls() as seen:
            call()
        assert seen.count == pytest.approx(charged, rel=0.2)


def test_a_block_prepares_the_operators_that_it_is_charged_for():
    x, text = torch.randn(2, 16, 8), torch.randn(2, 5, 8)
    block, joint = (
        BasicTransformerBlock(8, 2, 4, cross_attention_dim=8).eval(),
        JointTransformerBlock(8, 2, 4).eval(),
    )
    with torch.no_grad():
        with _Calls() as seen:
            block(x, encoder_hidden_states=text)
        assert seen.count == workload.OPERATORS
        with _Calls() as seen:
            joint(x, encoder_hidden_states=text, temb=torch.randn(2, 8))
        assert seen.count == workload.JOINT_OPERATORS


class _Calls(TorchDispatchMode):
    """Counts the operators that compute tensors: neither views nor questions about dtypes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += isinstance(result, (torch.Tensor, tuple)) and not function.is_view
        return result


@given(**ROOM)
def test_merging_more_tokens_never_saves_less(batch, tokens, channels, kind, branches):
    saved = [
        cost.balance(kind, batch, tokens, r, channels, branches=branches).saved
        for r in (0, tokens // 4, tokens // 2, tokens - 1)
    ]
    assert saved[0] == 0
    assert all(less <= more * (1 + 1e-9) + 1e-12 for less, more in pairwise(saved))


@given(**ROOM)
def test_more_branches_never_save_less(batch, tokens, channels, kind, branches):
    def saved(chosen: Branches) -> float:
        return cost.balance(kind, batch, tokens, tokens // 2, channels, branches=chosen).saved

    assert saved(replace(branches, merge_queries=False)) <= saved(branches) + 1e-12
    assert saved(branches) <= saved(Branches(merge_block=True)) * (1 + 1e-9) + 1e-12


@given(**ROOM)
def test_fewer_tokens_fewer_samples_and_fewer_channels_are_never_slower(
    batch, tokens, channels, kind, branches
):
    def time(batch: int, tokens: int, channels: int) -> float:
        r = tokens // 2
        work = workload.block(batch, tokens, channels, r=r, branches=branches)
        return cost.seconds(work + merging_work.patch(batch, tokens, channels, r), kind)

    most = time(batch, tokens, channels) * (1 + 1e-9)
    assert 0 < time(batch, tokens // 2, channels) <= most
    assert time(1, tokens, channels) <= most
    assert time(batch, tokens, channels // 2) <= most


@given(side=st.sampled_from([32, 64, 128, 256]), channels=st.sampled_from([8, 320]))
def test_matching_in_windows_grows_with_the_tokens_and_without_with_their_square(side, channels):
    def flops(side: int, window: int | None) -> int:
        tokens = side * side
        return workload.flops(merging_work.patch(2, tokens, channels, tokens // 2, window=window))

    assert flops(2 * side, 32) == 4 * flops(side, 32)
    assert flops(2 * side, None) == 16 * flops(side, None)


@given(tokens=st.integers(2, 70000), window=st.integers(1, 300), data=st.data())
def test_a_window_never_holds_more_candidates_than_there_are(tokens, window, data):
    destinations = data.draw(st.integers(1, tokens))
    near = merging_work.candidates(tokens, destinations, window)
    assert 1 <= near <= destinations
    assert merging_work.candidates(tokens, destinations, None) == destinations


@given(**ROOM)
def test_a_device_twice_as_fast_in_everything_takes_half_as_long(
    batch, tokens, channels, kind, branches
):
    rates = cost.rates(kind)
    rest = ("matmul", "attention", "memory", "rows", "best", "topk")
    twice = replace(rates, call=rates.call / 2, **{name: 2 * getattr(rates, name) for name in rest})
    for work in merging_work.patch(batch, tokens, channels, tokens // 2, branches=branches):
        assert cost.slowest(work, rates) == pytest.approx(2 * cost.slowest(work, twice))


@pytest.mark.parametrize("branches", [Branches(), Branches(merge_queries=False)])
def test_merging_few_tokens_does_not_pay(branches):
    for channels in (64, 320):
        assert not cost.balance("cpu", 2, 16, 8, channels, branches=branches).pays
    for channels in (64, 320, 1280):
        assert not cost.balance("cuda", 2, 64, 32, channels, branches=branches).pays


@pytest.mark.parametrize(
    "branches", [Branches(), Branches(merge_queries=False), Branches(merge_block=True)]
)
@pytest.mark.parametrize("joint", [False, True])
def test_merging_half_of_many_tokens_pays(branches, joint):
    assert cost.balance("cpu", 2, 4096, 2048, 320, branches=branches, joint=joint).pays
    assert cost.balance("cuda", 2, 16384, 8192, 320, branches=branches, joint=joint).pays


@given(**ROOM)
def test_merging_nothing_never_pays(batch, tokens, channels, kind, branches):
    assert not cost.balance(kind, batch, tokens, 0, channels, branches=branches).pays


@given(**ROOM)
def test_an_unknown_device_merges_where_a_fast_gpu_would(batch, tokens, channels, kind, branches):
    at = (batch, tokens, tokens // 2, channels)
    got = cost.balance("xpu", *at, branches=branches).pays
    assert got == cost.balance("cuda", *at, branches=branches).pays


# A device and the shape of a block that it computes faster than Python prepares it.
FAST, SHORT = "NVIDIA H100 80GB HBM3", (2, 4096, 2048, 320)


def test_an_eager_gpu_that_waits_for_python_is_left_alone():
    whole = {"branches": Branches(merge_block=True), "fused": True}
    assert cost.balance(FAST, *SHORT, **whole).saved == 0
    assert not cost.balance(FAST, *SHORT, **whole).pays
    assert cost.balance(FAST, *SHORT, **whole, eager=False).pays
    assert cost.balance("NVIDIA GeForce RTX 3060", *SHORT, **whole).pays


@given(**ROOM)
def test_kernels_never_cost_more_than_pytorch(batch, tokens, channels, kind, branches):
    at = (kind, batch, tokens, tokens // 2, channels)
    fused = cost.balance(*at, branches=branches, fused=True)
    assert fused.spent <= cost.balance(*at, branches=branches).spent * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce GTX 1650", "RTX 4090"),
        ("xpu", "RTX 4090"),
    ],
)
def test_a_card_is_known_by_its_name(name, known):
    teraflops, gigabytes = cost.PUBLISHED[known]
    assert cost.rates(name).matmul == teraflops * 1e12
    assert cost.rates(name).memory == gigabytes * 1e9


def test_measured_rates_go_before_published_ones(monkeypatch):
    monkeypatch.setitem(cost.MEASURED, "NVIDIA A10", cost.CPU)
    assert cost.rates("NVIDIA A10") is cost.CPU


def test_whether_it_pays_is_decided_while_compiling():
    def choose(x):
        batch, tokens, channels = x.shape
        saved, spent = cost.balance(x.device.type, batch, tokens, tokens // 2, channels)
        return x + (1 if saved > spent else 0)

    torch.compiler.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert [compiled(torch.zeros(2, n, 320)).mean() for n in (16, 1024)] == [0, 1]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"device_kind": None}, TypeError, 'device_kind must be a string such as "cuda", got None'),
        ({"batch": 0}, ValueError, "batch must be 1 or more, got 0"),
        ({"tokens": 0}, ValueError, "tokens must be 1 or more, got 0"),
        ({"tokens": 64.0}, TypeError, "tokens must be a whole number, 1 or more, got 64.0"),
        ({"r": -1}, ValueError, "r must be from 0 to 63, got -1"),
        ({"r": 64}, ValueError, "r must be from 0 to 63, got 64"),
        ({"r": True}, TypeError, "r must be a whole number, from 0 to 63, got True"),
        ({"channels": -320}, ValueError, "channels must be 1 or more, got -320"),
        ({"destinations": 0}, ValueError, "destinations must be from 1 to 32, got 0"),
        ({"destinations": 33}, ValueError, "destinations must be from 1 to 32, got 33"),
        ({"window": 0}, ValueError, "window must be 1 or more, got 0"),
        ({"text_tokens": "77"}, TypeError, "text_tokens must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, error, message):
    given = {"device_kind": "cpu", "batch": 2, "tokens": 64, "r": 32, "channels": 320} | changed
    with pytest.raises(error, match=message):
        cost.balance(**given)
