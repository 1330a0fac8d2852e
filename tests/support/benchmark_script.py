"""scripts/benchmark.py as the tests run it, and a UNet that takes it milliseconds."""

import importlib.util
import json
from pathlib import Path

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


def load():
    """The script as a module."""
    path = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, tmp_path, *args) -> dict:
    """Run the command on the CPU and return what it wrote."""
    output = tmp_path / "out" / "benchmark.json"
    line = ["benchmark.py", *map(str, args), "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr("sys.argv", line)
    script.main()
    return json.loads(output.read_text())
