"""Every pipeline of diffusers: how a tiny one is built and called, and what came of merging in it.

`FAMILIES` has those that are tried, `NOT_TRIED` the others with the reason, `FAULTS` what is known
to be wrong.
"""

from tests.support.pipelines.build import Case, Family, build, call
from tests.support.pipelines.images import IMAGES
from tests.support.pipelines.refused import NOT_TRIED, REFUSED
from tests.support.pipelines.unets import UNETS
from tests.support.pipelines.verdict import Verdict, verdict
from tests.support.pipelines.videos import VIDEOS

FAMILIES: dict[str, Family] = {
    name: family for family in (*UNETS, *IMAGES, *VIDEOS, *REFUSED) for name in family.pipelines
}

__all__ = [
    "FAMILIES",
    "NOT_TRIED",
    "Case",
    "Family",
    "Verdict",
    "build",
    "call",
    "verdict",
]
