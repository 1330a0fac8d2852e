"""Token merging as nodes of ComfyUI: README.md says how to install them."""

from .nodes import TokenMap, TokenMerging, TomePatchModel

NODE_CLASS_MAPPINGS = {
    "TokenMerging": TokenMerging,
    "TokenMap": TokenMap,
    # ComfyUI keeps its own node of this name, and takes this one where it has none.
    "TomePatchModel": TomePatchModel,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TokenMerging": "Token Merging",
    "TokenMap": "Token Map",
    "TomePatchModel": "Tome Patch Model",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
