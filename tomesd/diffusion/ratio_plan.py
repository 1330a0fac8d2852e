"""The ratio of each level of a model in each stage of the denoising."""

from collections.abc import Iterable, Sequence
from typing import Any

from tomesd.diffusion.ratio_schedule import (
    MOST_PIECES,
    LateSchedule,
    NormalRatio,
    Place,
    RatioSchedule,
)
from tomesd.diffusion.scheduler_steps import SchedulerSteps


class LevelRatio:
    """The ratio at one level in each stage.

    >>> LevelRatio((0.5, 0.0)).largest
    0.5
    """

    def __init__(self, by_stage: Sequence[float]):
        # As text: torch.compile(dynamic=True) makes every float a variable, but how many tokens
        # merge must be a constant.
        self._by_stage = tuple(map(repr, by_stage))

    @property
    def by_stage(self) -> tuple[float, ...]:
        return tuple([float(text) for text in self._by_stage])

    def at(self, stage: int) -> float:
        return float(self._by_stage[stage])

    @property
    def largest(self) -> float:
        return max([float(text) for text in self._by_stage])

    def __str__(self) -> str:
        return "ratio " + ", ".join(f"{ratio:.2g}" for ratio in self.by_stage)


class RatioPlan:
    """The ratio at each level of a model, in each stage of the denoising.

    >>> plan = RatioPlan({1: RatioSchedule.first(0.5, until=0.4), 2: 0.25}, pipe)
    >>> plan.of_level(1).by_stage
    (0.5, 0.0)

    ratio: as `DiffusionSettings` keeps it. A level is given by how much coarser its token grid is
        than the finest one with attention; or a block by its name in the model.
    pipe: the diffusers pipeline whose scheduler counts the steps, if the ratio changes over them.
    ends: of the stages, within which no level's ratio changes.

    Raises TypeError without such a pipeline, ValueError if the ratio changes too often.
    """

    def __init__(self, ratio: NormalRatio, pipe: Any = None):
        places = ratio if isinstance(ratio, dict) else {0: ratio}
        self.schedules: dict[Place, RatioSchedule] = {
            place: each if isinstance(each, RatioSchedule) else RatioSchedule(((1.0, each),))
            for place, each in places.items()
        }
        ends = {end for each in self.schedules.values() for end, _ in each.pieces}
        self.ends = tuple(sorted(ends))
        if len(ends) > MOST_PIECES:
            raise ValueError(f"ratio must change at most {MOST_PIECES - 1} times, got {self.ends}")
        self.steps = None
        if len(ends) > 1:
            if not hasattr(getattr(pipe, "scheduler", None), "timesteps"):
                raise TypeError(
                    "ratio must be a float without a pipeline whose scheduler counts the steps: "
                    f"a schedule needs apply_patch(pipe, ...), got a {type(pipe).__name__}"
                )
            self.steps = SchedulerSteps(pipe)

    @property
    def merges(self) -> bool:
        """Whether anything merges at any level in any step."""
        return any(ratio for each in self.schedules.values() for _, ratio in each.pieces)

    @property
    def changes(self) -> bool:
        """Whether the ratio depends on the step."""
        return self.steps is not None

    @property
    def names_places(self) -> bool:
        """Whether only some levels or blocks merge, each with a ratio of its own."""
        return 0 not in self.schedules

    @property
    def names_levels(self) -> bool:
        return self.names_places and not self.names_blocks

    @property
    def names_blocks(self) -> bool:
        return any(isinstance(place, str) for place in self.schedules)

    def check_levels(self, levels: list[int]) -> None:
        """Raises ValueError if the ratio names a level that the model does not have."""
        missing = set(self.schedules) - {0, *levels} if self.names_levels else None
        if missing:
            there = ", ".join(map(str, levels)) or "none"
            least = min(missing, key=str)
            raise ValueError(f"ratio by level must name levels among {there}, got {least}")

    def check_blocks(self, names: Iterable[str]) -> None:
        """Raises ValueError if the ratio names a block that the model does not have."""
        names = list(names)
        missing = set(self.schedules).difference(names) if self.names_blocks else None
        if missing:
            raise ValueError(
                "ratio by block must have names of blocks that can merge, such as "
                f"{names[0] if names else 'none here'}, got {min(map(str, missing))!r}"
            )

    def of_level(self, level: int, block: str = "") -> LevelRatio:
        """The ratio of one level, or of a block in it; 0 for what is not named."""
        named = self.schedules.get(level) or self.schedules.get(block)
        schedule = self.schedules.get(0) or named
        return LevelRatio([schedule.at(end) if schedule else 0.0 for end in self.ends])

    def stage(self, timestep: Any) -> int:
        """The index of the stage in which the model is called with this timestep."""
        return self._stage_at(self.steps.progress(timestep)) if self.steps else 0

    def _stage_at(self, progress: float) -> int:
        single = self.steps is not None and self.steps.count == 1
        if single and any(isinstance(each, LateSchedule) for each in self.schedules.values()):
            return len(self.ends) - 1
        # Ten of 25 steps are 0.4, however that rounds.
        return sum(progress >= end - 1e-6 for end in self.ends[:-1])

    def why_idle(self) -> str:
        """Why nothing merges in any step of the current image; empty if something does.

        The only step of a turbo model is both the first and the last.
        """
        if self.steps is None:
            return ""
        first, last = map(self._stage_at, self.steps.span())
        ends = self.ends[first : last + 1]
        if any(each.at(end) for each in self.schedules.values() for end in ends):
            return ""
        return f"the ratio is 0 in each of the steps that it takes, {self.steps.count} in all"
