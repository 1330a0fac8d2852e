"""Try merging in every pipeline of diffusers: python -m tests.pipelines runs/pipelines.json

`python scripts/tables.py --collect pipelines runs/pipelines.json` makes the table in docs/ of it.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch

from benchmarks.common.device import cpu_name
from benchmarks.common.files import write_json
from tests.support.pipelines import FAMILIES, NOT_TRIED, verdict


def main(output: Path) -> None:
    rows = []
    for name, family in FAMILIES.items():
        denoiser = type(family.denoiser(**family.pipelines[name].config)).__name__
        rows.append({"name": name, "denoiser": denoiser, **asdict(verdict(name, family))})
        print(f"{len(rows)}/{len(FAMILIES)} {name}", file=sys.stderr)
    environment = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "diffusers_version": diffusers.__version__,
    }
    write_json(output, {"environment": environment, "rows": rows, "not tried": NOT_TRIED})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
