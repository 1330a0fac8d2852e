"""Token merging as a plugin for models that other people wrote.

>>> pipe = tomesd.apply_patch(pipe, ratio=0.5)
>>> vit = tomesd.apply_patch(vit, r=4)
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from tomesd._moved import find_moved_modules as _find_moved_modules

if _TYPE_CHECKING:
    from tomesd.api import apply_patch, patched, register, remove_patch, report, supported
    from tomesd.core.token_map import TokenMap
    from tomesd.diffusion.ratio_schedule import RatioSchedule
    from tomesd.diffusion.settings import DiffusionSettings
    from tomesd.kernels import use_kernels
    from tomesd.reports import Report
    from tomesd.tracing import TokenGroups, trace
    from tomesd.vit.projectors import tokens_after
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
    "tokens_after",
    "trace",
    "use_kernels",
]

# Imported when they are first used: torch takes seconds, and `tomesd --help` can do without it.
_MODULES = {
    **dict.fromkeys(("apply_patch", "patched", "remove_patch", "report"), "api"),
    # Not from the registry itself, which knows the models once the families are imported.
    **dict.fromkeys(("register", "supported"), "api"),
    **dict.fromkeys(("TokenGroups", "trace"), "tracing"),
    "DiffusionSettings": "diffusion.settings",
    "RatioSchedule": "diffusion.ratio_schedule",
    "Report": "reports",
    "TokenMap": "core.token_map",
    "ViTSettings": "vit.settings",
    "tokens_after": "vit.projectors",
    "use_kernels": "kernels",
}

# Not for type checkers, to which every name would then be right.
if not _TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A public name, or a module of the package."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = f"{__name__}.{_MODULES.get(name, name)}"
        try:
            found = _import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        if name in _MODULES:
            globals()[name] = getattr(found, name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
