"""Try merging in every pipeline of diffusers: python -m tests.pipelines runs/pipelines.json

Names of pipelines may follow: these are tried again, and the others are left as the file has them.
`python scripts/tables.py --collect pipelines runs/pipelines.json` makes the table in docs/ of it.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch

from benchmarks.common.files import read_json, write_json
from tests.support.pipelines import FAMILIES, NOT_TRIED, verdict
from tomesd.pictures.device import cpu_name


def main(output: Path, names: Sequence[str]) -> None:
    found = (read_json(output) or {"rows": []}) if names else {"rows": []}
    rows = {row["name"]: row for row in found["rows"]}
    for name in names or FAMILIES:
        family = FAMILIES[name]
        denoiser = type(family.denoiser(**family.pipelines[name].config)).__name__
        rows[name] = {"name": name, "denoiser": denoiser, **asdict(verdict(name, family))}
        print(name, file=sys.stderr)
    environment = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__.partition("+")[0],
        "diffusers_version": diffusers.__version__,
    }
    own = [rows[name] for name in FAMILIES if name in rows]
    write_json(output, {"environment": environment, "rows": own, "not tried": NOT_TRIED})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
