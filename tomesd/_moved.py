"""Modules that had other names before the package got its folders: importing those still works."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "tomesd.cost": "tomesd.core.cost",
    "tomesd.map_joining": "tomesd.core.frames",
    "tomesd.matching": "tomesd.core.matching",
    "tomesd.partition": "tomesd.core.partition",
    "tomesd.patch": "tomesd.api",
    "tomesd.ratio_schedule": "tomesd.diffusion.ratio_schedule",
    "tomesd.schedule": "tomesd.vit.schedule",
    "tomesd.settings": "tomesd.diffusion.settings",
    "tomesd.token_map": "tomesd.core.token_map",
    "tomesd.vit_settings": "tomesd.vit.settings",
    "tomesd.workload": "tomesd.core.workload",
}


class _Finder(MetaPathFinder, Loader):
    """Finds them under their old names, with a DeprecationWarning."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        names = vars(importlib.import_module(new)).items()
        module.__dict__.update({name: value for name, value in names if name[:2] != "__"})


def find_moved_modules() -> None:
    """Let the old names be imported from now on."""
    sys.meta_path.append(_Finder())
