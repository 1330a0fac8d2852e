"""When kernels run, and that nothing else notices them."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tomesd
from tests.support.fake_gpu import can_be_faked
from tomesd import kernels
from tomesd.core import cost, partition
from tomesd.core.matching import bipartite_soft_matching
from tomesd.kernels import device

ON_THE_CPU = """
import sys, torch, tomesd
from tomesd.core.matching import bipartite_soft_matching
from tomesd.core.partition import strided
x = torch.randn(1, 64, 8, requires_grad=True)
made = bipartite_soft_matching(x, strided(8, 8), 20)
made.unmerge(made.merge(x)).sum().backward()
assert "tomesd.kernels.launches" not in sys.modules, "Triton's kernels were imported"
"""


def test_the_cpu_never_imports_the_kernels():
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_environment_switches_kernels_off():
    command = "from tomesd import kernels; print(kernels.enabled())"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"TOMESD_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False"]
    assert kernels.enabled()


@pytest.fixture
def gpu():
    """A GPU that runs kernels, as far as questions go."""
    known = ("NVIDIA GeForce RTX 3060", (8, 6))
    with (
        patch.object(device, "_described", lambda index: known),
        patch.object(kernels, "_HAS_TRITON", True),
        patch.object(torch.version, "hip", None),
    ):
        yield torch.device("cuda", 0)


def test_kernels_are_switched_off_and_on(gpu):
    assert kernels.available(gpu)
    try:
        tomesd.use_kernels(False)
        assert not kernels.available(gpu)
    finally:
        tomesd.use_kernels(True)
    assert kernels.available(gpu)
    with pytest.raises(TypeError, match="enabled must be a bool, got 'off'"):
        tomesd.use_kernels("off")


def test_without_triton_on_old_gpus_on_amd_s_and_elsewhere_pytorch_runs(gpu):
    with patch.object(kernels, "_HAS_TRITON", False):
        assert not kernels.available(gpu)
    with patch.object(device, "_described", lambda index: ("Tesla T4", (7, 5))):
        assert not kernels.available(gpu)
    with patch.object(torch.version, "hip", "6.4"):
        assert not kernels.available(gpu)
    for other in ("cpu", "mps", "xpu", "meta"):
        assert not kernels.available(torch.device(other))


def test_kernels_run_on_plain_tensors_of_one_known_dtype():
    x = torch.randn(1, 4, 8)
    with patch.object(kernels, "available", lambda device: True):
        assert kernels.usable(x, x)
        assert kernels.usable(x, constants=(torch.ones(1, 4, 1).double(), None))
        assert not kernels.usable(x.double())
        assert not kernels.usable(x, x.half())
        assert not kernels.usable(x[:, :0])
        assert not kernels.usable(x, constants=(torch.ones(1, 4, 1, requires_grad=True),))
        with FakeTensorMode() as mode:
            assert not kernels.usable(mode.from_tensor(x))
        torch.func.vmap(lambda each: torch.tensor(not kernels.usable(each)))(x)


@pytest.mark.skipif(not can_be_faked(), reason="this torch wants a GPU's driver")
def test_fake_tensors_of_a_gpu_are_left_to_pytorch():
    with FakeTensorMode():
        x = torch.empty(2, 64, 8, device="cuda", dtype=torch.half)
        made = bipartite_soft_matching(x, partition.strided(8, 8, device="cuda"), 20)
        assert made.unmerge(made.merge(x)).shape == x.shape


def test_a_gpu_is_known_by_its_name(gpu):
    assert kernels.device_kind(gpu) == "NVIDIA GeForce RTX 3060"
    assert kernels.device_kind(torch.device("cpu")) == "cpu"
    with patch.object(device, "_described", lambda index: ("", (0, 0))):
        assert kernels.device_kind(gpu) == "cuda"


def test_what_is_asked_of_a_gpu_while_compiling_is_a_constant(gpu):
    def choose(x):
        fused = kernels.available(gpu)
        return x + cost.rates(kernels.device_kind(gpu)).memory / 1e9 + fused

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 361


def test_operators_are_made_of_kernels_that_a_graph_can_hold():
    pytest.importorskip("triton")

    def block(x, order):
        rows = kernels.token_map(x, order, 48, 20)
        made = tomesd.TokenMap(*rows)
        merged = kernels.merge(x, made, None, "mean")
        return kernels.add_residual(x, merged, merged, made)

    x, order = torch.randn(1, 64, 8), torch.cat(partition.strided(8, 8))[None]
    with FakeTensorMode() as mode:
        torch.compiler.reset()
        fake = mode.from_tensor(x), mode.from_tensor(order)
        exported = torch._dynamo.export(block, aten_graph=False)(*fake).graph_module
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    for name in ("match", "build", "merge", "add_residual"):
        assert any(f"tomesd.{name}" in each for each in names), names
