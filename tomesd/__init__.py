"""Token merging for models that other people wrote.

>>> pipe = tomesd.apply_patch(pipe, ratio=0.5)
>>> vit = tomesd.apply_patch(vit, r=8)
"""

from tomesd.patch import apply_patch, patched, remove_patch, report, supported
from tomesd.ratio_schedule import RatioSchedule
from tomesd.settings import DiffusionSettings
from tomesd.token_map import TokenMap
from tomesd.tracing import TokenGroups, trace
from tomesd.vit_settings import ViTSettings

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
