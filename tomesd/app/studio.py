"""What the playground computes: images without and with merged tokens. Knows no page."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

from PIL import Image
from torch import Tensor

import tomesd
from tomesd.app.loading import LOADING
from tomesd.diffusion.ratio_schedule import Ratio, RatioSchedule
from tomesd.diffusion.settings import diffusion_settings
from tomesd.pictures import sampling
from tomesd.pictures.device import PRECISIONS, choose_device, choose_precision
from tomesd.pictures.differences import difference, psnr
from tomesd.pictures.memory import with_peak
from tomesd.pictures.token_pages import enlarged
from tomesd.shapes.names import DEFAULT
from tomesd.targets import default_preset
from tomesd.visualize import draw_groups

LONGEST_PROMPT = 1000

# After each step: steps that are done, and all steps.
Tick = Callable[[int, int], object]


class StoppedError(Exception):
    """The user pressed Stop."""


@dataclass(frozen=True)
class Merging:
    """How tokens merge: the arguments of `apply_patch` that the page has.

    levels: 1, 2, 4 or 8, or 0 for the preset's. since: the share of the steps that stays whole.
    """

    ratio: float = 0.5
    levels: int = 0
    since: float = 0.0
    preset: str | None = None
    method: str = "tome"

    def options(self) -> dict[str, Any]:
        """Raises ValueError for what does not go together."""
        ratio: Ratio = self.ratio
        if self.since and self.ratio:
            ratio = RatioSchedule.last(self.ratio, since=self.since)
        levels = {"max_downsample": self.levels} if self.levels else {}
        options = {"preset": self.preset, "method": self.method, **levels}
        more = {name: value for name, value in options.items() if name != "preset"}
        diffusion_settings(ratio, self.preset, more)
        return {"ratio": ratio, **options}


@dataclass(frozen=True)
class Scene:
    """What to draw; steps: None for the model's own."""

    prompt: str
    model: str = DEFAULT
    seed: int = 0
    steps: int | None = None

    def check(self) -> None:
        """Raises ValueError for what cannot be drawn."""
        if not self.prompt.strip():
            raise ValueError("Type a prompt first.")
        if len(self.prompt) > LONGEST_PROMPT:
            raise ValueError(f"The prompt may have at most {LONGEST_PROMPT} characters.")


@dataclass(frozen=True)
class Shot:
    """One image: seconds from the prompt to the pixels, and the peak of memory in bytes."""

    image: Image.Image
    seconds: float
    peak: int | None


@dataclass(frozen=True)
class MergeMap:
    """Which tokens merged in one step and block: groups int64 [h, w] of the image itself."""

    step: int
    where: str
    groups: Tensor


@dataclass(frozen=True)
class Result:
    """The image without and with merged tokens, and the maps of the latter."""

    unpatched: Shot
    merged: Shot
    maps: list[MergeMap] = field(default_factory=list)

    @property
    def psnr(self) -> float:
        return psnr(self.merged.image, self.unpatched.image)

    @property
    def speedup(self) -> float:
        return self.unpatched.seconds / self.merged.seconds

    @property
    def difference(self) -> Image.Image:
        return difference(self.merged.image, self.unpatched.image)

    @property
    def steps(self) -> list[int]:
        return sorted({each.step for each in self.maps})

    def draw_map(self, step: int, block: int) -> tuple[Image.Image, str]:
        """The image with its groups, and a caption; blocks count from 0, within that step."""
        blocks = [each for each in self.maps if each.step == step]
        found = blocks[min(block, len(blocks) - 1)]
        image = enlarged(self.merged.image, tuple(found.groups.shape))
        left = int(found.groups[found.groups >= 0].unique().numel())
        where = found.where.replace(".transformer_blocks.", ", block ")
        caption = f"Step {step + 1}, {where}: {found.groups.numel()} tokens, {left} groups"
        return draw_groups(image, found.groups), caption

    def blocks(self, step: int) -> int:
        return sum(each.step == step for each in self.maps)


class Studio:
    """Loads pipelines and draws with them, one image at a time.

    >>> studio = Studio()
    >>> studio.draw(Scene("a photo of a red heart", steps=1), Merging(0.5)).merged.image.size
    (128, 128)

    model: the only one that may be drawn with; None lets the page name any.
    """

    def __init__(self, model: str | None = None) -> None:
        self.model = model
        self.device = choose_device()
        self._lock = Lock()
        self._loaded: tuple[str, Any] | None = None
        self._unpatched: OrderedDict[Scene, Shot] = OrderedDict()

    def draw(
        self,
        scene: Scene,
        merging: Merging,
        tick: Tick = lambda done, steps: None,
        stop: Event | None = None,
        with_maps: bool = True,
    ) -> Result:
        """The image without and with merged tokens.

        with_maps: record which tokens merge, which takes a little time.
        Raises StoppedError once `stop` is set, ValueError or OSError for what cannot be drawn.
        """
        scene.check()
        options = merging.options()
        with self._lock:
            pipe = self._load(scene.model, tick)
            if not (merging.preset or merging.levels or merging.since):
                options["preset"] = default_preset(pipe)
            unpatched = self._draw_unpatched(pipe, scene, tick, stop)
            tracing = with_maps and merging.ratio > 0
            with tomesd.patched(pipe, **options):
                merged, maps = self._shoot(pipe, scene, tick, stop, tracing)
        return Result(unpatched, merged, maps)

    def sweep(
        self, scene: Scene, settings: dict[str, Merging], tick: Tick, stop: Event | None = None
    ) -> Iterator[tuple[str, Result]]:
        """The image with each of some settings, as soon as it is drawn."""
        for name, merging in settings.items():
            yield name, self.draw(scene, merging, tick, stop, with_maps=False)

    def _load(self, model: str, tick: Tick) -> Any:
        if self.model is not None and model != self.model:
            raise ValueError(f"The model must be {self.model}, got {model!r}.")
        if self._loaded is None or self._loaded[0] != model:
            tick(0, 0)
            precision = PRECISIONS[choose_precision(self.device)]
            with LOADING:
                pipe = sampling.load_pipeline(model, self.device, precision)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = model, pipe
            self._unpatched.clear()
            # First calls allocate memory and load kernels, which no setting should pay for.
            self._shoot(pipe, Scene("", model, steps=2), tick, None)
        return self._loaded[1]

    def _draw_unpatched(self, pipe: Any, scene: Scene, tick: Tick, stop: Event | None) -> Shot:
        if scene not in self._unpatched:
            self._unpatched[scene], _ = self._shoot(pipe, scene, tick, stop)
            if len(self._unpatched) > 16:
                self._unpatched.popitem(last=False)
        return self._unpatched[scene]

    def _shoot(
        self, pipe: Any, scene: Scene, tick: Tick, stop: Event | None, tracing: bool = False
    ) -> tuple[Shot, list[MergeMap]]:
        how = sampling.choose(pipe, scene.model, scene.steps)

        def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
            if stop is not None and stop.is_set():
                raise StoppedError
            tick(step + 1, how.steps)
            return {}

        def run() -> Image.Image:
            more: dict[str, Any] = {"callback_on_step_end": after_step}
            (image,) = sampling.sample(pipe, [scene.prompt], [scene.seed], how, **more)
            return image

        if stop is not None and stop.is_set():
            raise StoppedError
        traced: list[tomesd.TokenGroups] = []
        with ExitStack() as stack:
            if tracing:
                traced = stack.enter_context(tomesd.trace(pipe))
            start = time.perf_counter()
            image, peak = with_peak(run, self.device)
            seconds = time.perf_counter() - start
        maps = [
            MergeMap(each.step, each.where, each.patches[-1])
            for each in traced
            if len(each.grid) == 2
        ]
        return Shot(image, seconds, peak), maps
