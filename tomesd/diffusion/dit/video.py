"""Which tokens of a video merge: those within each frame, or across neighbouring frames."""

from dataclasses import replace

from torch import Tensor

from tomesd.core.frames import clips, frame_by_frame, in_frames, place_by_place, side_by_side
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.dit.record import Grid
from tomesd.diffusion.settings import DiffusionSettings


class VideoMatching:
    """Token maps of pictures and videos, whose grid is (frames, height, width).

    Across frames, each clip of sx·sy frames or a few more is matched by itself. With as many
    neighbours in time in a cell as there are tokens in a cell of a frame, as much can merge, and
    every place has a destination in each clip: what stands still finds itself there.
    """

    def __init__(self, settings: DiffusionSettings):
        self.settings = settings
        self.in_clips = replace(settings, sx=settings.sx * settings.sy, sy=1)

    def token_map(self, x: Tensor, grid: Grid, key: Tensor | None) -> TokenMap:
        """Of tokens [B, frames·h·w, C]."""
        frames, h, w = grid
        maps, start = [], 0
        for count, length in self._cut(frames):
            end = start + count * length * h * w
            each = x[:, start:end].unflatten(1, (count, length * h * w)).flatten(0, 1)
            if length == 1:
                found = self.settings.token_map(each, h, w, key)
            else:
                each = place_by_place(each, length, w)
                found = self.in_clips.token_map(each, h, w * length, key)
                found = frame_by_frame(found, length)
            maps.append(in_frames(found, count))
            start = end
        return maps[0] if len(maps) == 1 else side_by_side(maps)

    def merged(self, grid: Grid) -> int:
        """How many tokens merge."""
        frames, h, w = grid
        return sum(
            count * (self.settings if length == 1 else self.in_clips).merged(h, w * length)
            for count, length in self._cut(frames)
        )

    def _cut(self, frames: int) -> list[tuple[int, int]]:
        """What is matched together: so often, so many frames."""
        if self.settings.across_frames:
            return clips(frames, self.settings.sx * self.settings.sy)
        return [(frames, 1)]
