"""Guidance by perturbed attention, as diffusers' guiders hook it: what goes with merged tokens.

A feed-forward that is skipped hands on the merged tokens that it is given, and attention in which
each token looks at nothing but itself does so with merged tokens too.
"""

from typing import Any


def check_guidance(attention: Any, merges_queries: bool, merges_keys: bool) -> None:
    """Raise ValueError if what a hook does to the attention cannot be done to merged tokens."""
    if merges_queries and any(
        type(hook).__name__ == "SmoothedEnergyGuidanceHook"
        for hook in _hooks(getattr(attention, "to_q", None))
    ):
        raise ValueError(
            "smoothed-energy guidance cannot be combined with merged queries, which are in no "
            "square that it could blur: take it off, or merge keys only in a UNet, "
            'apply_patch(..., preset="quality")'
        )
    if merges_queries != merges_keys and any(
        getattr(hook, "skip_attention_scores", False) for hook in _hooks(attention)
    ):
        raise ValueError(
            "merge_queries must be True with perturbed-attention guidance, which gives each query "
            "its own value, got False: apply_patch(..., merge_attn=True) or the defaults merge "
            "queries too"
        )


def is_skipped(block: Any) -> bool:
    """Whether the block hands on what it is given: nothing in it that merging could save."""
    return any(
        type(hook).__name__ == "TransformerBlockSkipHook" and hook.dropout == 1
        for hook in _hooks(block)
    )


def _hooks(module: Any) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())
