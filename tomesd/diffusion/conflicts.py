"""What diffusers can do to a block that does not go with merged tokens: guiders, caches, fusion."""

from typing import Any

# The hooks of diffusers that hand out what a module gave in earlier steps.
_CACHES = {"pyramid_attention_broadcast", "taylorseer_cache"}


def check_guidance(attention: Any, merges_queries: bool, merges_keys: bool) -> None:
    """Raise ValueError if a guider's hook on the attention cannot run on merged tokens.

    A feed-forward that is skipped hands on the merged tokens that it is given, and attention in
    which each token attends to itself alone works on merged tokens too.
    """
    if merges_queries and any(
        type(hook).__name__ == "SmoothedEnergyGuidanceHook"
        for hook in _hooks(getattr(attention, "to_q", None))
    ):
        raise ValueError(
            "smoothed-energy guidance cannot be combined with merged queries, which form no grid "
            "that it could blur: remove it, or merge keys only in a UNet, "
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
    """Whether a guider skips the block: there is nothing in it that merging could save."""
    return any(
        type(hook).__name__ == "TransformerBlockSkipHook" and hook.dropout == 1
        for hook in _hooks(block)
    )


def check_cache(*modules: Any) -> None:
    """Raise ValueError if one of diffusers' caches keeps something from step to step.

    Its hooks are on the module itself, whoever applied them; offloading and casting keep nothing.
    """
    for module in modules:
        if getattr(module, "is_cache_enabled", False) or any(
            hook._is_stateful for hook in _hooks(module)
        ):
            raise ValueError(
                "a cache must not be enabled while tokens merge, got one: its values belong to the "
                "tokens of another step; call disable_cache() on the model"
            )


def cache_of(module: Any) -> str | None:
    """The name of the cache that hands out this module's output of earlier steps, if any."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else next(iter(_CACHES.intersection(registry.hooks)), None)


def fused_projections_error(setting: str, value: bool) -> ValueError:
    """What to raise for an option that needs keys of their own, with fused projections."""
    return ValueError(
        f"{setting} must be {not value} with fused projections, which have no separate keys, got "
        f"{value}: call unfuse_qkv_projections() on the model"
    )


def _hooks(module: Any) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())
