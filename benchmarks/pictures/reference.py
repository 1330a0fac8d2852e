"""Reference pictures for the Fréchet distance: drawn by code, or from a folder."""

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

# Precision and recall need each picture's third nearest neighbor in its own set.
FEWEST = 4

# Prompts take held-out scenes from the front, references from the back, so that none is in both.
DRAWN = HELD_OUT[len(HELD_OUT) // 2 :]


class BrokenPictureError(OSError):
    """A picture's file that cannot be read completely, or is not the expected picture."""


@dataclass(frozen=True)
class Reference:
    """A reference set whose pictures can be scaled to any size.

    >>> drawn(5000).of_size((128, 128))[0].shape
    torch.Size([3, 128, 128])

    name: identifies the set. of_size: its pictures at a width and height.
    """

    name: str
    of_size: Callable[[tuple[int, int]], Dataset]


class Pictures(Dataset):
    """Picture files as uint8 tensors [3, H, W], scaled and cropped to one size.

    >>> Pictures([Path("a.png")], (128, 128))[0].shape
    torch.Size([3, 128, 128])

    size: width and height. A picture of another size is scaled until it covers this one, and
        cropped.
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
    """Pictures of the Shapes world, drawn on access.

    >>> Drawn([0], (128, 128))[0].shape
    torch.Size([3, 128, 128])
    """

    def __init__(self, indices: Sequence[int], size: tuple[int, int]) -> None:
        self.indices = indices
        self.size = size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        picture = draw(scene(self.indices[index]), max(self.size))
        return as_tensor(ImageOps.fit(picture, self.size, Image.Resampling.BICUBIC))


def read(path: Path) -> Image.Image:
    """A complete picture in RGB. Raises BrokenPictureError."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow raises SyntaxError for broken PNG headers and ValueError for some others.
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenPictureError(f"{path} is broken: {error}") from error


def as_tensor(image: Image.Image) -> Tensor:
    """A picture as uint8 [3, H, W]."""
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
    """Pictures from a folder or, if it has a folder for each class, equally many of each class.

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
    """The pictures of each class's folder, by its name; "" for those of a folder without classes.

    Raises ValueError if there are no pictures.
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
    """`count` pictures, equally many of each class; the same ones on every machine.

    Raises ValueError if a class has too few.
    """
    if count is None:
        return [path for paths in found.values() for path in paths]
    each, more = divmod(count, len(found))
    random = np.random.Generator(np.random.PCG64(0))
    picked = []
    # If count is not a multiple of the number of classes, randomly chosen ones give one more.
    larger = set(random.permutation(len(found))[:more].tolist())
    for place, (name, paths) in enumerate(found.items()):
        needed = each + (place in larger)
        if len(paths) < needed:
            raise ValueError(
                f"reference must hold {needed} pictures of each class for {count} in all, got "
                f"{len(paths)} in {name or 'the folder'}"
            )
        picked += [paths[i] for i in sorted(random.permutation(len(paths))[:needed].tolist())]
    return picked
