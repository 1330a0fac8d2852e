"""Token merging as a plugin for models that other people wrote.

>>> pipe = tomesd.apply_patch(pipe, ratio=0.5)
>>> vit = tomesd.apply_patch(vit, r=4)
"""

from tomesd._moved import find_moved_modules as _find_moved_modules
from tomesd.api import apply_patch, patched, remove_patch, report
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.ratio_schedule import RatioSchedule
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.kernels import use_kernels
from tomesd.registry import register, supported
from tomesd.reports import Report
from tomesd.tracing import TokenGroups, trace
from tomesd.vit.settings import ViTSettings

__version__ = "1.0.0"

_find_moved_modules()

__all__ = [
    "DiffusionSettings",
    "RatioSchedule",
    "Report",
    "TokenGroups",
    "TokenMap",
    "ViTSettings",
    "apply_patch",
    "patched",
    "register",
    "remove_patch",
    "report",
    "supported",
    "trace",
    "use_kernels",
]
