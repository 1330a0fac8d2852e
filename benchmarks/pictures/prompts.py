"""Prompts: of held-out scenes of the Shapes world, of ImageNet's classes, or from a file."""

from pathlib import Path

from benchmarks.pictures.reference import FEWEST
from tomesd.pictures.prompts import read_prompts
from tomesd.shapes.world import HELD_OUT, Scene, scene


def held_out(count: int) -> list[Scene]:
    """The first scenes that no model was trained on.

    >>> len(held_out(8))
    8

    Raises ValueError if count is below 1 or more than there are.
    """
    if not 0 < count <= len(HELD_OUT):
        raise ValueError(f"count must be from 1 to {len(HELD_OUT)}, got {count}")
    return [scene(index) for index in HELD_OUT[:count]]


def load_prompts(source: str, count: int | None) -> list[str]:
    """`count` prompts, repeated cyclically if the source has fewer.

    >>> load_prompts("imagenet", 4)[:2]
    ['A high quality photograph of a tench.', 'A high quality photograph of a goldfish.']

    source: "shapes", "imagenet" (ToMe, Appendix F) or a file with one prompt per line. count: None
        for 1,000 of the Shapes world, or each of the others once.
    Raises FileNotFoundError, or ValueError for a file that is empty or has empty lines, and for
    fewer prompts than the statistics need.
    """
    if source == "shapes":
        found = [scene.prompt for scene in held_out(1000 if count is None else count)]
    elif source == "imagenet":
        # Class names from the metadata; no weights are loaded.
        from torchvision.models import ResNet50_Weights

        names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
        found = [f"A high quality photograph of a {name}." for name in names]
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(f"prompts must be shapes, imagenet or a file, got {source!r}")
        found = read_prompts(Path(source))
    found = [found[index % len(found)] for index in range(count or len(found))]
    if len(found) < FEWEST:
        raise ValueError(
            f"num-images must be {FEWEST} or more for the statistics, got {len(found)}"
        )
    return found
