"""The process in which tomesd==0.1.3 runs: answers requests, one line of JSON for each.

Started by `benchmarks.peer.process` with PyPI's package first on the path, so nothing imported here
may import this project's own `tomesd`.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import tomesd
from benchmarks.common import memory, timing
from benchmarks.models import unets

peer_merge: Any = importlib.import_module("tomesd.merge")


class Worker:
    """One method for each request."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}

    def where(self) -> str:
        return str(tomesd.__file__)

    def load(self, config: dict, device: str, dtype: str) -> None:
        """Create the weights that all variants share."""
        self.config = config
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.unet = unets.build_unet(config, self.device, self.dtype)

    def patch(self, variant: str, settings: dict, compiled: str | None) -> None:
        """Patch a model for this variant."""
        twin = unets.share_weights(self.unet)
        tomesd.apply_patch(twin, **settings)
        if compiled:
            twin = torch.compile(twin, dynamic=False, mode=compiled)
        self.models[variant] = twin

    def forward(self, variant: str, batch: int, size: int) -> float:
        """Seconds of one forward."""
        return timing.seconds(self._forward(variant, batch, size), self.device)

    def matches(self, variant: str, batch: int, size: int) -> int:
        """The number of blocks that merge in one forward."""
        count = 0
        original = peer_merge.bipartite_soft_matching_random2d

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        peer_merge.bipartite_soft_matching_random2d = counting
        try:
            model = self.models[variant]
            args, kwargs = self._inputs(batch, size)
            with torch.no_grad():
                getattr(model, "_orig_mod", model)(*args, **kwargs)
        finally:
            peer_merge.bipartite_soft_matching_random2d = original
        return count

    def peak(self, variant: str, batch: int, size: int) -> tuple[int, int]:
        """Bytes in use before one forward, and the most during it."""
        return memory.peak_memory(self._forward(variant, batch, size), self.device)

    def merging(
        self, batch: int, h: int, w: int, channels: int, settings: dict, device: str, dtype: str
    ) -> dict[str, float]:
        """Seconds of matching, merging and unmerging random tokens."""
        place = torch.device(device)
        x = unets.noise((batch, h * w, channels), place, getattr(torch, dtype))
        r = int(settings["ratio"] * h * w)
        random = {"no_rand": not settings["use_rand"], "generator": torch.Generator(place)}

        def match() -> tuple[Callable, Callable]:
            return peer_merge.bipartite_soft_matching_random2d(
                x, w, h, settings["sx"], settings["sy"], r, **random
            )

        with torch.no_grad():
            return timing.merging_seconds(match, x)

    def load_pipeline(self, folder: str, device: str, dtype: str) -> None:
        """Load the pipeline of `sample`."""
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.pipe: Any = pipe.to(device, silence_dtype_warnings=True)
        self.pipe.set_progress_bar_config(disable=True)

    def sample(
        self, settings: dict, prompts: list[str], seeds: list[int], options: dict, file: str
    ) -> None:
        """Write the patched pipeline's pictures as one array. options: the pipeline's."""
        # A patch keeps a generator, seeded from the global one.
        torch.manual_seed(seeds[0])
        tomesd.apply_patch(self.pipe.unet, **settings)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        np.save(file, self.pipe(prompts, generator=generators, **options).images)

    def _inputs(self, batch: int, size: int) -> tuple[tuple, dict]:
        return unets.unet_inputs(self.config, batch, size, self.device, self.dtype)

    def _forward(self, variant: str, batch: int, size: int) -> Callable[[], object]:
        model = self.models[variant]
        args, kwargs = self._inputs(batch, size)

        def run() -> object:
            with torch.no_grad():
                return model(*args, **kwargs)

        return run


def main() -> None:
    # Only answers go to the pipe: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
