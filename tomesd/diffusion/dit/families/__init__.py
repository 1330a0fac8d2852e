"""The lines of models in diffusers, one file each; importing this package registers all of them."""

from importlib import import_module
from pkgutil import walk_packages

for _file in walk_packages(__path__, f"{__name__}."):
    import_module(_file.name)
