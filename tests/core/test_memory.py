"""The matching of a large picture fits beside the model: its scores never stand there whole."""

import subprocess
import sys

from tests.support.slow import slow

# The whole score matrix would be 49,152 × 16,384 floats: 3.2 GB.
MATCHING = """
import resource
import torch
from tomesd.core.matching import bipartite_soft_matching
from tomesd.core.partition import strided

def peak_mb():
    try:  # On Linux, getrusage counts what the parent process held when it started this one.
        with open("/proc/self/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

metric = torch.randn(1, 65_536, 320, generator=torch.Generator().manual_seed(0))
before = peak_mb()
token_map = bipartite_soft_matching(metric, strided(256, 256), r=32_768)
print(token_map.m, peak_mb() - before)
"""


@slow
def test_matching_65536_tokens_of_320_channels_needs_less_than_600_mb_above_its_input():
    # In a process of its own, whose peak is that of the matching and of nothing before it.
    done = subprocess.run(
        [sys.executable, "-c", MATCHING], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    groups, megabytes = done.stdout.split()
    assert int(groups) == 32_768
    assert float(megabytes) > 84, "less than the normalised tokens take: the measurement is broken"
    assert float(megabytes) < 600
