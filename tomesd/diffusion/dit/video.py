"""Which tokens of a video merge: those within each frame, or across neighbouring frames."""

from dataclasses import replace

from torch import Tensor

from tomesd.core.frames import clips, concatenate, in_frames, time_first, time_last
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.block import Grid
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.settings import DiffusionSettings


class VideoMatcher:
    """Token maps of images and videos, whose grid is (frames, height, width).

    Across frames, each clip of sx·sy frames or a few more is matched separately. A cell holds as
    many neighbours in time as a cell of a frame holds tokens, so as much can merge, and every
    position has a destination in each clip: static content finds itself there.
    """

    def __init__(self, settings: DiffusionSettings):
        self.across_frames = settings.across_frames
        self.clip_length = settings.sx * settings.sy
        self.frame = Matcher(settings)
        self.clip = Matcher(replace(settings, sx=self.clip_length, sy=1))

    def token_map(self, x: Tensor, grid: Grid, ratio: float, key: Tensor | None) -> TokenMap:
        """The token map of tokens [B, frames·h·w, C]."""
        frames, h, w = grid
        maps, start = [], 0
        for count, length in self._cut(frames):
            end = start + count * length * h * w
            part = x[:, start:end].reshape(x.shape[0] * count, length * h * w, x.shape[2])
            if length == 1:
                found = self.frame.token_map(part, h, w, ratio, key)
            else:
                part = time_last(part, length, w)
                found = self.clip.token_map(part, h, w * length, ratio, key)
                found = time_first(found, length)
            maps.append(in_frames(found, count))
            start = end
        return maps[0] if len(maps) == 1 else concatenate(maps)

    def merged(self, ratio: float, grid: Grid) -> int:
        """How many tokens merge."""
        frames, h, w = grid
        return sum(
            count * (self.frame if length == 1 else self.clip).merged(ratio, h, w * length)
            for count, length in self._cut(frames)
        )

    def _cut(self, frames: int) -> list[tuple[int, int]]:
        """What is matched together: (how many times, how many frames)."""
        return clips(frames, self.clip_length) if self.across_frames else [(frames, 1)]
