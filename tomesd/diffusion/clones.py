"""Patches that follow a clone: ComfyUI's and Forge's ModelPatcher objects share one model.

A node gets a clone of a ModelPatcher, adds to its options and hands it on, and all clones sample
with the same modules. So hooks cannot stay there. A clone's first call of the model installs them,
and they go when ComfyUI has finished sampling, or when anybody else calls the model: before that
call computes anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tomesd.diffusion.dit import DiTPatch
from tomesd.diffusion.unet import UNetPatch
from tomesd.hooks import PATCH, BlockTrace

# ComfyUI's names of wrappers around `BaseModel.apply_model` and of callbacks after sampling, and
# our key among them.
_APPLY_MODEL, _ON_CLEANUP, _KEY = "apply_model", "on_cleanup", "tomesd"

# The attribute in which a model keeps the follower whose hooks it has.
_FOLLOWER = "_tomesd_follower"


@dataclass
class _Scheduler:
    """What `SchedulerSteps` asks of a pipeline's scheduler."""

    timesteps: list[float] = field(default_factory=lambda: [0.0])
    _step_index: int = 0
    _begin_index: int = 0


@dataclass(eq=False)
class Follower:
    """The patches of one clone.

    patches: by the module that they are for. keeps_maps: whether `maps` gets the token map of the
    first block that merges in each step of the last image, by the number of the step.
    """

    patches: dict[nn.Module, UNetPatch | DiTPatch] = field(default_factory=dict)
    scheduler: _Scheduler = field(default_factory=_Scheduler)
    keeps_maps: bool = False
    maps: dict[int, BlockTrace] = field(default_factory=dict)
    calling: bool = False
    guards: list[RemovableHandle] = field(default_factory=list)

    # ComfyUI and Forge copy their options deeply. The patches refer to the model.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Follower":
        return self

    def wrap(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `apply_model(x, sigma, …)`."""
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        compiles = "torch.compile" in options.get("wrappers", {}).get(_APPLY_MODEL, {})
        if compiles or hasattr(executor.class_obj.diffusion_model, "_orig_mod"):
            raise ValueError(
                "a model with token merging must not be compiled here, got one with torch.compile: "
                "compiled code would merge in the other clones of the model too; remove either"
            )
        with self.calls(args[1], options):
            return executor(*args, **kwargs)

    @contextmanager
    def calls(self, sigma: Tensor, options: dict[str, Any]) -> Iterator[None]:
        """Around a call of the model with this clone's options."""
        if self.keeps_maps or any(patch.plan.changes for patch in self.patches.values()):
            self._count_steps(sigma, options)
        if any(vars(module).get(PATCH) is not patch for module, patch in self.patches.items()):
            self._install()
        self.calling = True
        try:
            yield
        finally:
            self.calling = False

    def _install(self) -> None:
        self.uninstall()
        for module in self.patches:
            other: Follower | None = vars(module).get(_FOLLOWER)
            if other is not None:
                other.uninstall()
            if PATCH in vars(module):
                raise ValueError(
                    f"{type(module).__name__} must not be patched itself while a patched clone "
                    "samples: remove_patch(module) first"
                )
        for module, patch in self.patches.items():
            patch.install()
            setattr(module, PATCH, patch)
            setattr(module, _FOLLOWER, self)
            self.guards.append(module.register_forward_pre_hook(self._guard, prepend=True))
            if self.keeps_maps:
                self._keep_map(patch)

    def _guard(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.calling:
            self.uninstall()

    def uninstall(self, clone: Any = None) -> None:
        """Take the hooks away until the next call. clone: whose sampling has finished."""
        for module, patch in self.patches.items():
            if vars(module).get(_FOLLOWER) is self:
                delattr(module, _FOLLOWER)
            if vars(module).get(PATCH) is patch:
                delattr(module, PATCH)
                patch.remove()
        for guard in self.guards:
            guard.remove()
        self.guards.clear()

    def _count_steps(self, sigma: Tensor, options: dict[str, Any]) -> None:
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            raise ValueError(
                "transformer_options must have sample_sigmas, which ComfyUI's samplers pass, for a "
                "ratio that changes over the steps or for token maps; got none"
            )
        now = float(sigma.max())
        self.scheduler.timesteps = sigmas[:-1].tolist()
        # Between two steps, where some samplers call the model too, the one before counts.
        done = sum(each > now * (1 + 1e-4) for each in self.scheduler.timesteps)
        self.scheduler._step_index = min(done, len(self.scheduler.timesteps) - 1)
        if done == 0:
            self.maps.clear()

    def _keep_map(self, patch: UNetPatch | DiTPatch) -> None:
        def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found = patch.traced(block)
            if found is not None:
                self.maps[self.scheduler._step_index] = _of_first_image(found, patch)

        for block in list(patch.blocks)[:1]:
            # Before the patch's own last hook, which forgets the map.
            patch.handles.append(block.register_forward_hook(keep, prepend=True))


def _of_first_image(found: BlockTrace, patch: UNetPatch | DiTPatch) -> BlockTrace:
    """Without the reference images that follow it and have grids of their own."""
    if len(found.grid) > 1 or not isinstance(patch, DiTPatch) or patch.hooks.last is None:
        return found
    frames, h, w = patch.hooks.last.grids[0]
    end = found.prefix + frames * h * w
    grid = (h, w) if frames == 1 else (frames, h, w)
    return BlockTrace(found.group[:, found.prefix : end], 0, grid)


@dataclass(eq=False)
class FunctionWrapper:
    """A follower as Forge and Fooocus call it, who have no other wrappers: around the model's call.

    inner: the wrapper that another extension had set before, or None.
    """

    follower: Follower
    inner: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "FunctionWrapper":
        return self

    def __call__(self, apply_model: Any, call: dict[str, Any]) -> Any:
        options = call["c"].get("transformer_options", {})
        with self.follower.calls(call["timestep"], options):
            if self.inner is not None:
                return self.inner(apply_model, call)
            return apply_model(call["input"], call["timestep"], **call["c"])


def clone_of(model: Any) -> Any:
    """The ModelPatcher that is meant: itself, or that of a model object of Forge; None for others.

    >>> clone_of(torch.nn.Linear(1, 1)) is None
    True
    """
    if isinstance(model, nn.Module):
        return None
    found = getattr(getattr(model, "forge_objects", None), "unet", model)
    options, shared = getattr(found, "model_options", None), getattr(found, "model", None)
    return found if isinstance(options, dict) and isinstance(shared, nn.Module) else None


def follow(clone: Any, follower: Follower) -> None:
    """Let the follower's patches hold whenever the model is called with this clone's options."""
    leave(clone)
    if hasattr(clone, "add_wrapper_with_key"):
        clone.add_wrapper_with_key(_APPLY_MODEL, _KEY, follower.wrap)
        clone.add_callback_with_key(_ON_CLEANUP, _KEY, follower.uninstall)
        return
    options = clone.model_options
    options["model_function_wrapper"] = FunctionWrapper(
        follower, options.get("model_function_wrapper")
    )


def follower_of(clone: Any) -> Follower | None:
    """The follower of a clone, if it has one."""
    wrappers = getattr(clone, "wrappers", {}).get(_APPLY_MODEL, {}).get(_KEY)
    if wrappers:
        found: Follower = wrappers[0].__self__
        return found
    function = clone.model_options.get("model_function_wrapper")
    return function.follower if isinstance(function, FunctionWrapper) else None


def leave(clone: Any) -> None:
    """Take a clone's follower away; the other clones keep theirs."""
    follower = follower_of(clone)
    if follower is not None:
        follower.uninstall()
    if hasattr(clone, "remove_wrappers_with_key"):
        clone.remove_wrappers_with_key(_APPLY_MODEL, _KEY)
        clone.remove_callbacks_with_key(_ON_CLEANUP, _KEY)
    function = clone.model_options.get("model_function_wrapper")
    if isinstance(function, FunctionWrapper):
        del clone.model_options["model_function_wrapper"]
        if function.inner is not None:
            clone.model_options["model_function_wrapper"] = function.inner
