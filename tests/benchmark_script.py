"""scripts/benchmark.py as the tests run it."""

import importlib.util
import json
from pathlib import Path


def load():
    """The script as a module."""
    path = Path(__file__).parents[1] / "scripts" / "benchmark.py"
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
