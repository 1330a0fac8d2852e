"""The pictures that others are measured against: drawn by code, or taken from a folder."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from tomesd.shapes.world import HELD_OUT, draw, scene

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Precision and recall ask for each picture's third nearest neighbor in its own set.
FEWEST = 4

# Prompts take held-out scenes from the front; no scene is on both sides.
DRAWN = HELD_OUT[len(HELD_OUT) // 2 :]


class BrokenPictureError(OSError):
    """A picture's file that cannot be read to its end, or is not what it should be."""


@dataclass(frozen=True)
class Reference:
    """A reference set before it has a size in pixels.

    name says in a word which one it is, and is another for another set.
    """

    name: str
    of_size: Callable[[tuple[int, int]], Dataset]


class Pictures(Dataset):
    """Picture files as uint8 tensors [3, H, W], scaled and cropped to one size.

    >>> Pictures([Path("a.png")], (128, 128))[0].shape
    torch.Size([3, 128, 128])

    size: width and height. A picture of another size is scaled until it covers this one, and what
        stands out at its sides is cut off.
    Reading raises BrokenPictureError, which names the file, for one that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read(self.paths[index])
        if image.size != self.size:
            image = ImageOps.fit(image, self.size, Image.Resampling.BICUBIC)
        return as_tensor(image)


class Drawn(Dataset):
    """Pictures of the Shapes world, drawn when they are asked for."""

    def __init__(self, indices: Sequence[int], size: tuple[int, int]) -> None:
        self.indices = indices
        self.size = size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        picture = draw(scene(self.indices[index]), max(self.size))
        return as_tensor(ImageOps.fit(picture, self.size, Image.Resampling.BICUBIC))


def read(path: Path) -> Image.Image:
    """A picture in RGB, read to its end. Raises BrokenPictureError."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow raises SyntaxError for broken PNG headers and ValueError for some others.
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenPictureError(f"{path} is broken: {error}") from error


def as_tensor(image: Image.Image) -> Tensor:
    """[3, H, W], bytes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def drawn(count: int) -> Reference:
    """Pictures of the Shapes world whose scenes are in no prompt and no training set.

    >>> drawn(5000).name
    'shapes-5000'
    """
    if not FEWEST <= count <= len(DRAWN):
        raise ValueError(f"num-reference must be from {FEWEST} to {len(DRAWN)}, got {count}")
    return Reference(f"shapes-{count}", partial(Drawn, DRAWN[:count]))


def from_folder(folder: Path, count: int | None) -> Reference:
    """Pictures from a folder: its own ones or, if it has folders for classes, as many of each.

    >>> from_folder(Path("imagenet/val"), 5000).name
    'folder-5000-3f1d…'

    count: None for all. Which ones are picked depends on the files' names alone.
    Raises FileNotFoundError if there is no such folder, and ValueError if it holds too few.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"reference must be a folder with pictures, got {str(folder)!r}")
    paths = pick(classes(folder), count)
    if len(paths) < FEWEST:
        raise ValueError(f"reference must hold {FEWEST} pictures or more, got {len(paths)}")
    lines = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return Reference(f"folder-{len(paths)}-{digest}", partial(Pictures, paths))


def classes(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class's folder, by its name; those of the folder itself if it has none.

    Raises ValueError if there are none at all.
    """
    folders = sorted(place for place in folder.iterdir() if place.is_dir())
    found = {place.name: _pictures(place) for place in folders} if folders else {}
    found = {name: paths for name, paths in found.items() if paths} or {"": _pictures(folder)}
    if not any(found.values()):
        raise ValueError(f"reference must hold pictures ({', '.join(EXTENSIONS)}), got {folder}")
    return found


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def pick(found: dict[str, list[Path]], count: int | None) -> list[Path]:
    """As many of each class as count allows; which ones is the same on every machine.

    Raises ValueError if a class has too few.
    """
    if count is None:
        return [path for paths in found.values() for path in paths]
    each, more = divmod(count, len(found))
    random = np.random.Generator(np.random.PCG64(0))
    picked = []
    # Where count is not a multiple of the classes, some, drawn by lot, give one more.
    lucky = set(random.permutation(len(found))[:more].tolist())
    for place, (name, paths) in enumerate(found.items()):
        needed = each + (place in lucky)
        if len(paths) < needed:
            raise ValueError(
                f"reference must hold {needed} pictures of each class for {count} in all, got "
                f"{len(paths)} in {name or 'the folder'}"
            )
        picked += [paths[i] for i in sorted(random.permutation(len(paths))[:needed].tolist())]
    return picked
