"""Pictures as files: written whole or not at all, with their settings inside."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

from PIL import Image
from PIL.PngImagePlugin import PngInfo


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write, which becomes `path` on leaving; after an exception it is gone.

    >>> with whole(Path("figures.json")) as partial:
    ...     partial.write_text("{}")

    What was at `path` before stays until the new file is complete. Folders are made as needed.
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
    """Write a PNG, whole or not at all; `Image.open(path).text` gives the metadata back.

    >>> save_image(image, Path("heart.png"), {"prompt": "a heart", "seed": 0})

    metadata: by name; the values are written as `str` gives them, in any language.
    """
    texts = PngInfo()
    for name, value in metadata.items():
        texts.add_itxt(name, str(value))
    with whole(path) as partial:
        image.save(partial, format="PNG", pnginfo=texts)


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, as metadata: "<package>_version".

    >>> versions("torch").keys()
    dict_keys(['torch_version'])

    A package that runs from its source folder alone has no version that could be told.
    """
    found = {}
    for package in packages:
        try:
            found[f"{package}_version"] = version(package)
        except PackageNotFoundError:
            found[f"{package}_version"] = "not installed"
    return found


def check_output(output: Path) -> None:
    """Raises ValueError unless `output` is a .png file or a folder, and can be written to."""
    is_file = _is_file(output)
    if not is_file and _looks_like_a_picture(output):
        raise ValueError(f"output must be a .png file or a folder, got {str(output)!r}")
    _check_place(output.parent if is_file else output, output)


def check_folder(output: Path) -> None:
    """Raises ValueError unless `output` is a folder, there or to be made, and can be written to.

    >>> check_folder(Path("runs/sd1.5"))

    The name of a picture is refused too: a folder table.png/ is not what was meant.
    """
    if output.is_file():
        raise ValueError(f"output must be a folder, got the file {str(output)!r}")
    if _looks_like_a_picture(output):
        raise ValueError(f"output must be a folder, got a picture's name, {str(output)!r}")
    _check_place(output, output)


def check_file(output: Path) -> None:
    """Raises ValueError unless `output` is a file, there or to be made, and can be written to.

    >>> check_file(Path("figures.json"))
    """
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {str(output)!r}")
    _check_place(output.parent, output)


def _looks_like_a_picture(output: Path) -> bool:
    # By what Pillow knows, since a folder's name may have a dot in it: sd1.5.
    return output.suffix.lower() in Image.registered_extensions() and not output.is_dir()


def _check_place(folder: Path, output: Path) -> None:
    """Whether files can be written in a folder; it is not made if it is not there."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        # Tried, since permissions do not tell all: /proc takes no files from anyone.
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"output must be in a writable folder, got {str(output)!r}: {error.strerror}"
        ) from error


def destination(output: Path, index: int = 0, count: int = 1) -> Path:
    """Where picture `index` of `count` goes.

    >>> destination(Path("heart.png"), 1, count=3)
    PosixPath('heart-1.png')

    A file is itself, or numbered from 0 if there are several pictures; what is there is replaced.
    A folder gives the next free name, 00001.png and so on; nothing in it is ever replaced.
    """
    if _is_file(output):
        return output if count == 1 else output.with_stem(f"{output.stem}-{index}")
    taken = [int(file.stem) for file in output.glob("*.png") if file.stem.isdecimal()]
    return output / f"{max(taken, default=0) + 1:05}.png"


def _is_file(output: Path) -> bool:
    return output.suffix.lower() == ".png" and not output.is_dir()
