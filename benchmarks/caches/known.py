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

from benchmarks.caches.repeat import every, repeated
from benchmarks.peer.process import install_package

DEEPCACHE = "DeepCache==0.1.1"

# A context in which a pipeline's denoiser, the second argument, is cached.
Apply = Callable[[Any, Any], AbstractContextManager[None]]


@contextmanager
def deepcache(pipe: Any, denoiser: Any, *, interval: int) -> Iterator[None]:
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
    pipe: Any, denoiser: nn.Module, *, apply: Callable[[nn.Module, Callable[[], int]], None]
) -> Iterator[None]:
    """A cache of diffusers, which is told the timestep and where an image begins."""
    now: dict[str, Any] = {"calls": 0, "timestep": 0}

    def begin(model: nn.Module, args: Any, kwargs: Any) -> None:
        if now["calls"] % len(pipe.scheduler.timesteps) == 0:
            hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        _set_cache_context(model, CacheContext("image"))
        now["calls"] += 1
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now["timestep"] = int(torch.as_tensor(timestep).max())

    before = {module: module.forward for module in denoiser.modules()}
    apply(denoiser, lambda: now["timestep"])
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


def _broadcast(model: nn.Module, timestep: Callable[[], int], *, interval: int) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        cross_attention_block_skip_range=2 * interval,
        current_timestep_callback=timestep,
    )
    hooks.apply_pyramid_attention_broadcast(model, config)


def _taylor(model: nn.Module, timestep: Callable[[], int], *, interval: int) -> None:
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*transformer_blocks\.\d+"],
    )
    hooks.apply_taylorseer_cache(model, config)


def _first_block(model: nn.Module, timestep: Callable[[], int], *, threshold: float) -> None:
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=threshold))


def repeat(interval: int) -> Apply:
    """The plain cache that computes the first fifth of the steps, then every `interval`-th one."""
    return partial(_repeat, interval=interval)


def _repeat(pipe: Any, denoiser: nn.Module, *, interval: int) -> AbstractContextManager[None]:
    return repeated(pipe, denoiser, partial(every, interval=interval))


_BLOCKS: Mapping[str, Apply] = {
    f"{name} {interval}": partial(_hooked, apply=partial(apply, interval=interval))
    for name, apply in {"pyramid attention broadcast": _broadcast, "TaylorSeer": _taylor}.items()
    for interval in (2, 3)
}
UNET_CACHES: Mapping[str, Apply] = {
    **{f"DeepCache {interval}": partial(deepcache, interval=interval) for interval in (2, 3)},
    **_BLOCKS,
}
TRANSFORMER_CACHES: Mapping[str, Apply] = {
    **{
        f"first-block cache {threshold:g}": partial(
            _hooked, apply=partial(_first_block, threshold=threshold)
        )
        for threshold in (0.1, 0.2)
    },
    **_BLOCKS,
}


def known_caches(denoiser: Any) -> Mapping[str, Apply]:
    """The caches that a UNet or a transformer can have, by name.

    >>> list(known_caches(pipe.unet))[0]
    'DeepCache 2'

    MagCache needs magnitudes that were calibrated for the model and FasterCache the inputs of a
    video model: neither runs on the embedded pipelines.
    """
    return UNET_CACHES if hasattr(denoiser, "down_blocks") else TRANSFORMER_CACHES
