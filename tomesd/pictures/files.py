"""Picture files that are written completely or not at all, and where they may be written."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` on leaving; after an exception it is deleted.

    >>> with atomic_write(Path("figures.json")) as partial:
    ...     partial.write_text("{}")

    What was at `path` before stays until the new file is complete. Folders are created as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: only within one file system is a rename atomic.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, object]) -> None:
    """Write a PNG atomically; `Image.open(path).text` gives the metadata back.

    >>> save_image(image, Path("heart.png"), {"prompt": "a heart", "seed": 0})

    metadata: by name; the values are written as `str` gives them, in any language.
    """
    texts = PngInfo()
    for name, value in metadata.items():
        texts.add_itxt(name, str(value))
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=texts)


def open_image(path: Path) -> Image.Image:
    """An image file in RGB, turned as its camera says.

    >>> open_image(Path("photo.jpg")).mode
    'RGB'

    Raises FileNotFoundError, and ValueError for what is no image or has too many pixels to be one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image must be a file, got {str(path)!r}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"image must be in an image format, got {str(path)!r}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image must have fewer pixels, got {str(path)!r}: {error}") from error


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, as metadata: "<package>_version".

    >>> versions("torch").keys()
    dict_keys(['torch_version'])

    "not installed" for a package that runs from its source folder.
    """
    found = {}
    for package in packages:
        try:
            found[f"{package}_version"] = version(package)
        except PackageNotFoundError:
            found[f"{package}_version"] = "not installed"
    return found


def check_output(output: Path) -> None:
    """Raises ValueError unless `output` is a .png file or a folder, and can be written to.

    >>> check_output(Path("heart.png"))
    """
    is_file = _is_file(output)
    if not is_file and looks_like_a_picture(output):
        raise ValueError(f"output must be a .png file or a folder, got {str(output)!r}")
    check_writable(output.parent if is_file else output, output)


def looks_like_a_picture(output: Path) -> bool:
    # By the extensions that Pillow knows, since a folder's name may have a dot in it: sd1.5.
    return output.suffix.lower() in Image.registered_extensions() and not output.is_dir()


def check_writable(folder: Path, output: Path) -> None:
    """Whether files can be written to a folder; it is not created if it does not exist."""
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        # Tried, since permissions are not enough: /proc takes no files from anyone.
        TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(
            f"output must be in a writable folder, got {str(output)!r}: {error.strerror}"
        ) from error


def destination(output: Path, index: int = 0, count: int = 1) -> Path:
    """The file for picture `index` of `count`.

    >>> destination(Path("heart.png"), 1, count=3)
    PosixPath('heart-1.png')

    A file name is used as it is, or numbered from 0 for several pictures; existing files are
    replaced. A folder gives the next free name, 00001.png and so on, and never replaces a file.
    """
    if _is_file(output):
        return output if count == 1 else output.with_stem(f"{output.stem}-{index}")
    taken = [int(file.stem) for file in output.glob("*.png") if file.stem.isdecimal()]
    return output / f"{max(taken, default=0) + 1:05}.png"


def _is_file(output: Path) -> bool:
    return output.suffix.lower() == ".png" and not output.is_dir()
