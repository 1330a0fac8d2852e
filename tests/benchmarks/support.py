"""What the benchmarks' tests share: a tiny UNet, a fake tomesd==0.1.3, and refused commands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.speed.command import main

ROOT = Path(__file__).resolve().parents[2]

# A forward takes milliseconds.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}

# The same entry points as PyPI's package, so that the tests need no network. It changes nothing at
# ratio 0.3, adds noise at 0.5 and fails at 0.25.
_PEER = {
    "__init__.py": "from tomesd.patch import apply_patch\n",
    "patch.py": """
import torch
from tomesd import merge

def apply_patch(model, ratio, **settings):
    if ratio == 0.25:
        raise AttributeError("this host is too new")
    for handle in getattr(model, "handles", ()):
        handle.remove()
    def hook(module, args):
        merge.bipartite_soft_matching_random2d(args[0], 4, 4, 2, 2, 8, no_rand=True)
        return (args[0] + (torch.randn(args[0].shape) if ratio == 0.5 else 0), *args[1:])
    model.handles = [model.mid_block.register_forward_pre_hook(hook)]
""",
    "merge.py": """
def bipartite_soft_matching_random2d(metric, w, h, sx, sy, r, no_rand=False, generator=None):
    print("libraries may print")
    return lambda x: x[:, r:], lambda y: y
""",
}


def save_unet(folder: Path) -> Path:
    """A folder with the tiny UNet's configuration."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(UNET))
    return folder


def save_peer(cache: Path, version: str = "0.1.3") -> Path:
    """A cache of peers with a fake package."""
    package = cache / f"tomesd-{version}" / "tomesd"
    package.mkdir(parents=True)
    for name, source in _PEER.items():
        (package / name).write_text(source)
    return cache


def run_benchmark(folder: Path, *args: object) -> dict:
    """Run scripts/benchmark.py on the CPU; returns what it wrote."""
    output = folder / "out" / "benchmark.json"
    main([*map(str, args), "--device", "cpu", "--output", str(output)])
    return json.loads(output.read_text())


def refused(command: Callable, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The error, in one line, with which a command refuses its arguments before any work."""
    with pytest.raises(SystemExit) as stopped:
        command(argv)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    return " ".join(captured.err.split())
