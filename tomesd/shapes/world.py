"""The Shapes world: photos of one shape on one background, drawn by code.

Every picture shows one of 8 shapes in one of 8 colours before a background of one of 4 kinds in a
second colour. The same index is always the same picture, at any size.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "cross", "ring")
COLORS = {
    "red": (208, 40, 44),
    "orange": (240, 138, 30),
    "yellow": (246, 218, 60),
    "green": (52, 150, 66),
    "cyan": (74, 200, 210),
    "blue": (42, 76, 190),
    "purple": (136, 56, 160),
    "white": (238, 238, 238),
}
KINDS = ("plain", "striped", "checkered", "gradient")

# Scenes that no model is trained on: for judging.
HELD_OUT = range(10_000_000, 10_100_000)

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `prompt` says it in words; the rest varies without being told.

    center, radius and period are in units of the picture's side, angles in radians.
    """

    shape: str
    color: str
    kind: str
    ground: str
    center: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.3
    tilt: float = 0.0
    period: float = 0.125
    phase: float = 0.0
    slant: float = 0.0

    @property
    def prompt(self) -> str:
        return f"a photo of a {self.color} {self.shape} on a {self.ground} {self.kind} background"

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """The indices of shape, color, kind and ground in SHAPES, COLORS, KINDS and COLORS."""
        colors = list(COLORS)
        return (
            SHAPES.index(self.shape),
            colors.index(self.color),
            KINDS.index(self.kind),
            colors.index(self.ground),
        )


def scene(index: int) -> Scene:
    """The scene with this index, the same on every machine.

    >>> scene(0) == scene(0)
    True

    index: any non-negative integer; there is no last one.
    Raises ValueError if it is negative.
    """
    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    random = np.random.Generator(np.random.PCG64(index))
    color, ground = random.choice(list(COLORS), size=2, replace=False)
    return Scene(
        shape=str(random.choice(SHAPES)),
        color=str(color),
        kind=str(random.choice(KINDS)),
        ground=str(ground),
        center=(random.uniform(0.44, 0.56), random.uniform(0.44, 0.56)),
        radius=random.uniform(0.27, 0.36),
        tilt=random.uniform(-0.3, 0.3),
        period=random.uniform(0.11, 0.15),
        phase=random.uniform(0, 1),
        slant=random.uniform(-0.4, 0.4),
    )


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """Draw a scene as an RGB picture of size × size pixels.

    >>> draw(scene(7)).size
    (128, 128)

    Raises ValueError if size is under 16 px, where the shapes can no longer be told apart.
    """
    if size < 16:
        raise ValueError(f"size must be 16 px or more, got {size}")
    picture = _shade(COLORS[scene.ground], _background(scene, size))
    mask = draw_mask(scene, size)

    # The light falls from the top left: a soft shadow to the bottom right, brighter where it hits.
    drop = round(0.035 * size)
    shadow = ImageChops.offset(mask, drop, drop).filter(ImageFilter.GaussianBlur(0.025 * size))
    shadow = shadow.point(lambda value: value * 0.45)
    picture = Image.composite(Image.new("RGB", picture.size), picture, shadow)
    columns, rows = _grid(size, 1)
    light = (scene.center[0] - columns + scene.center[1] - rows) / (2 * scene.radius)
    return Image.composite(_shade(COLORS[scene.color], 0.22 * light), picture, mask)


def _grid(size: int, oversampling: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every (sub)pixel's centre, in units of the picture's side."""
    side = size * oversampling
    centers = (np.arange(side, dtype=np.float32) + 0.5) / side
    return centers[None, :], centers[:, None]


def _shade(color: tuple[int, int, int], amount: np.ndarray) -> Image.Image:
    """A surface of one colour, lighter where amount is positive, darker where it is negative."""
    base = np.asarray(color, dtype=np.float32)
    amount = amount[..., None]
    shaded = np.where(amount > 0, base + (255 - base) * amount, base * (1 + amount))
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8))


def _background(scene: Scene, size: int) -> np.ndarray:
    """How much lighter or darker than its colour the background is at each pixel."""
    columns, rows = _grid(size, _SUPERSAMPLING)
    along = columns * math.cos(scene.slant) + rows * math.sin(scene.slant)
    across = rows * math.cos(scene.slant) - columns * math.sin(scene.slant)
    if scene.kind == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if scene.kind == "gradient":
        amount = 0.35 - 0.8 * along
    else:
        dark = np.floor(along / scene.period + scene.phase) % 2 == 1
        if scene.kind == "checkered":
            dark ^= np.floor(across / scene.period + scene.phase) % 2 == 1
        amount = np.where(dark, np.float32(-0.42), np.float32(0.12))
    cells: np.ndarray = amount.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    means: np.ndarray = cells.mean((1, 3))
    return means


def draw_mask(scene: Scene, size: int = 128) -> Image.Image:
    """How much of each pixel the shape covers: an 8-bit grey picture of size × size pixels.

    >>> draw_mask(scene(7)).getextrema()
    (0, 255)
    """
    side = size * _SUPERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """From the shape's own frame (unit radius, y down) to pixels."""
        cos, sin = math.cos(scene.tilt), math.sin(scene.tilt)
        return [
            (
                side * (scene.center[0] + scene.radius * (x * cos - y * sin)),
                side * (scene.center[1] + scene.radius * (x * sin + y * cos)),
            )
            for x, y in points
        ]

    def disc(x: float, y: float, radius: float, fill: int) -> None:
        ((x, y),) = place([(x, y)])
        radius *= scene.radius * side
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    match scene.shape:
        case "circle":
            disc(0, 0, 0.95, 255)
        case "ring":
            disc(0, 0, 1.0, 255)
            disc(0, 0, 0.52, 0)
        case "moon":
            disc(0, 0, 1.0, 255)
            disc(0.5, -0.1, 0.82, 0)
        case "square":
            pen.polygon(place([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]), 255)
        case "triangle":
            pen.polygon(place([(0, -1.0), (1.0, 0.75), (-1.0, 0.75)]), 255)
        case "cross":
            a, b = 0.34, 1.0
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            corners += [(-x, -y) for x, y in corners]
            pen.polygon(place(corners), 255)
        case "star":
            spikes = [(1.08 if i % 2 == 0 else 0.46, math.pi * i / 5) for i in range(10)]
            pen.polygon(place([(r * math.sin(a), -r * math.cos(a)) for r, a in spikes]), 255)
        case "heart":
            angles = np.linspace(0, 2 * math.pi, 120, endpoint=False)
            x = 16 * np.sin(angles) ** 3
            y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles)
            y = y - np.cos(4 * angles) + 2.5
            pen.polygon(place(list(zip(x / 15.5, -y / 15.5, strict=True))), 255)
    return mask.resize((size, size), Image.Resampling.BOX)
