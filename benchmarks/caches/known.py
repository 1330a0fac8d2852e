"""The caches that users have: DeepCache from PyPI, and diffusers' own."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from benchmarks.peer.process import install_package

DEEPCACHE = "DeepCache==0.1.1"

# A context in which a pipeline's denoiser is cached for images of some steps.
Apply = Callable[[Any, Any, int], AbstractContextManager[None]]


@contextmanager
def deepcache(pipe: Any, denoiser: Any, steps: int, *, interval: int) -> Iterator[None]:
    """Only the finest level is computed, but for every `interval`-th step.

    Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free" (2024).
    """
    folder = str(install_package(DEEPCACHE, Path("runs/peers")).resolve())
    sys.path.insert(0, folder)
    try:
        helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    finally:
        sys.path.remove(folder)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def _hooked(
    pipe: Any, denoiser: nn.Module, steps: int, *, apply: Callable[[nn.Module, Any, int], None]
) -> Iterator[None]:
    """A cache of diffusers, which is told the timestep and where an image begins."""
    now: dict[str, Any] = {"calls": 0, "timestep": 0}

    def begin(model: nn.Module, args: Any, kwargs: Any) -> None:
        if now["calls"] % steps == 0:
            hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        _set_cache_context(model, CacheContext("image"))
        now["calls"] += 1
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now["timestep"] = int(torch.as_tensor(timestep).max())

    before = {module: module.forward for module in denoiser.modules()}
    apply(denoiser, lambda: now["timestep"], steps)
    handle = denoiser.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for module, forward in before.items():
            if hasattr(module, "_diffusers_hook"):
                del module._diffusers_hook
                module.__dict__.pop("forward", None)
                if module.forward != forward:
                    module.forward = forward


def _broadcast(model: nn.Module, timestep: Any, steps: int, *, interval: int) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        cross_attention_block_skip_range=2 * interval,
        current_timestep_callback=timestep,
    )
    hooks.apply_pyramid_attention_broadcast(model, config)


def _taylor(model: nn.Module, timestep: Any, steps: int, *, interval: int) -> None:
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=max(2, steps // 5),
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*transformer_blocks\.\d+"],
    )
    hooks.apply_taylorseer_cache(model, config)


def _first_block(model: nn.Module, timestep: Any, steps: int, *, threshold: float) -> None:
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=threshold))


_UNET: Mapping[str, Apply] = {
    f"DeepCache {interval}": partial(deepcache, interval=interval) for interval in (2, 3)
}
_BOTH: Mapping[str, Apply] = {
    **{
        f"pyramid attention broadcast {interval}": partial(
            _hooked, apply=partial(_broadcast, interval=interval)
        )
        for interval in (2, 3)
    },
    **{
        f"TaylorSeer {interval}": partial(_hooked, apply=partial(_taylor, interval=interval))
        for interval in (2, 3)
    },
}
_TRANSFORMER: Mapping[str, Apply] = {
    f"first-block cache {threshold:g}": partial(
        _hooked, apply=partial(_first_block, threshold=threshold)
    )
    for threshold in (0.1, 0.2)
}


def known_caches(denoiser: Any) -> dict[str, Apply]:
    """The caches that a denoiser can have, by name.

    >>> list(known_caches(pipe.unet))[0]
    'DeepCache 2'

    MagCache needs magnitudes that were calibrated for the model and FasterCache the inputs of a
    video model; neither runs on the embedded pipelines.
    """
    is_unet = hasattr(denoiser, "down_blocks")
    return {**(_UNET if is_unet else _TRANSFORMER), **_BOTH}
