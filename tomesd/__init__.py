"""Token merging for models that other people wrote.

>>> pipe = tomesd.apply_patch(pipe, ratio=0.5)
>>> vit = tomesd.apply_patch(vit, r=8)
"""

from tomesd.api import apply_patch, patched, remove_patch, report, supported
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.ratio_schedule import RatioSchedule
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.tracing import TokenGroups, trace
from tomesd.vit.settings import ViTSettings

__version__ = "1.0.0"

__all__ = [
    "DiffusionSettings",
    "RatioSchedule",
    "TokenGroups",
    "TokenMap",
    "ViTSettings",
    "apply_patch",
    "patched",
    "remove_patch",
    "report",
    "supported",
    "trace",
]
