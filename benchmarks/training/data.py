"""Training data: pictures of the Shapes world with their labels and masks, drawn once."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ViTConfig

from tomesd.pictures.files import atomic_write
from tomesd.shapes.world import draw, draw_mask, scene

# A patch's mask has this many cells along each side.
MASK_CELLS = 4


def draw_pictures(indices: Iterable[int], size: int) -> torch.Tensor:
    """The pictures of these scenes: uint8 [n, 3, size, size].

    >>> draw_pictures([0, 1], 128).shape
    torch.Size([2, 3, 128, 128])
    """
    drawn = [
        np.asarray(draw(scene(index), size))
        for index in tqdm(indices, desc=f"drawing at {size} px", mininterval=5)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def cached(file: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor that make() returns, cached in a file.

    >>> images = cached(Path("pictures.pt"), lambda: draw_pictures([0, 1], 128))
    """
    if not file.exists():
        with atomic_write(file) as partial:
            torch.save(make(), partial)
    return torch.load(file, mmap=True)


def masks(indices: Iterable[int], patches: int) -> torch.Tensor:
    """The labels of MaskedClassifier's second head: uint8 [n, patches², MASK_CELLS²]."""
    size = patches * MASK_CELLS
    drawn = torch.stack(
        [torch.from_numpy(np.array(draw_mask(scene(index), size))) for index in indices]
    )
    cells = F.unfold(drawn[:, None].float(), MASK_CELLS, stride=MASK_CELLS)
    return cells.transpose(1, 2).byte()


class LabelledPictures(NamedTuple):
    """The classifier's training data.

    images: uint8 [n, 3, 128, 128]. covered: see `masks`. labels: int64 [n, 4], of `Scene.labels`,
    on the device of training.
    """

    images: torch.Tensor
    covered: torch.Tensor
    labels: torch.Tensor


def labelled_pictures(
    count: int, config: ViTConfig, folder: Path, device: torch.device | str
) -> LabelledPictures:
    """The first `count` scenes with labels and masks, cached in a folder.

    >>> data = labelled_pictures(4096, model.config, Path("runs/shapes"), "cpu")
    """
    indices, size = range(count), config.image_size
    images = cached(folder / f"pictures-{size}-{count}.pt", lambda: draw_pictures(indices, size))
    covered = cached(
        folder / f"masks-{count}.pt", lambda: masks(indices, size // config.patch_size)
    )
    labels = torch.tensor([scene(index).labels for index in indices])
    return LabelledPictures(images, covered, labels.to(device))


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as floats from -1 to 1, the input of autoencoder and classifier."""
    return images.float() / 127.5 - 1


def random_rows(data: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(len(data), (batch,), generator=generator)
