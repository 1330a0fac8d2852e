"""Training with merging in several processes through accelerate is training in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import tomesd
from tests.support.data_parallel import KINDS, SETTINGS, WAYS, build, gradients
from tests.support.slow import slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> list[dict]:
    """What each of two processes, with half of the batch each, has after backward."""
    folder = tmp_path_factory.mktemp("shares")
    # `accelerate launch --cpu` starts one process only.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "tests.support.data_parallel", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{index}.pt") for index in range(2)]


@slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(shares, way, kind):
    alone = Accelerator(cpu=True)
    assert alone.num_processes == 1
    plain, model = build(kind), tomesd.apply_patch(build(kind), **SETTINGS[kind])
    without = gradients(kind, plain, plain, alone)
    expected = gradients(kind, model, model, alone)
    for share in shares:
        wrapper, got = share[kind, way]
        assert wrapper == "DistributedDataParallel"
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    # And merging made them others than they would have been.
    assert any(not torch.allclose(expected[name], without[name]) for name in expected)
