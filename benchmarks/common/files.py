"""Files that are written completely or not at all, and folders named after their settings."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from PIL import Image
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` on leaving; after an exception it is deleted.

    >>> with atomic_folder(Path("assets/classifier")) as partial:
    ...     model.save_pretrained(partial)

    What was at `path` before stays until the new folder is complete.
    """
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))

    def clean_up() -> None:
        if old.exists() and not path.exists():  # Interrupted between the two renames.
            old.rename(path)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)

    clean_up()
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        clean_up()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    >>> write_text(Path("table.md"), "| r |")
    """
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    """Write JSON atomically; what JSON has no type for is written as `str` gives it.

    >>> write_json(Path("results.json"), {"rows": []})
    """
    write_text(path, json.dumps(record, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any | None:
    """What a JSON file holds; None if there is no file.

    >>> write_json(Path("results.json"), {"rows": []})
    >>> read_json(Path("results.json"))
    {'rows': []}
    """
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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


def digest(path: Path | str | None) -> str:
    """A hash of the content of a file or folder; a hub id is returned as it is, None as "None".

    >>> len(digest("assets/pipeline"))
    12
    """
    if path is None or not Path(path).exists():
        return str(path)
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(f"{file.relative_to(path)}\0".encode())
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:12]


def settings_folder(root: Path, settings: Mapping[str, Any]) -> Path:
    """A folder named after a hash of these settings, so that results of others never mix with it.

    >>> folder = settings_folder(Path("runs/quality"), {"steps": 25, **versions("torch")})

    settings: everything that the folder's contents depend on; they are written to settings.json.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:12]
    if not (folder / "settings.json").exists():
        write_text(folder / "settings.json", text + "\n")
    return folder


def check_output(output: Path) -> None:
    """Raises ValueError unless `output` is a .png file or a folder, and can be written to.

    >>> check_output(Path("heart.png"))
    """
    is_file = _is_file(output)
    if not is_file and _looks_like_a_picture(output):
        raise ValueError(f"output must be a .png file or a folder, got {str(output)!r}")
    _check_writable(output.parent if is_file else output, output)


def check_folder(output: Path) -> None:
    """Raises ValueError unless `output` is an existing or a new folder that can be written to.

    >>> check_folder(Path("runs/sd1.5"))

    The name of a picture is refused too: a folder table.png/ is not what was meant.
    """
    if output.is_file():
        raise ValueError(f"output must be a folder, got the file {str(output)!r}")
    if _looks_like_a_picture(output):
        raise ValueError(f"output must be a folder, got a picture's name, {str(output)!r}")
    _check_writable(output, output)


def check_file(output: Path) -> None:
    """Raises ValueError unless `output` is an existing or a new file that can be written to.

    >>> check_file(Path("figures.json"))
    """
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {str(output)!r}")
    _check_writable(output.parent, output)


def _looks_like_a_picture(output: Path) -> bool:
    # By the extensions that Pillow knows, since a folder's name may have a dot in it: sd1.5.
    return output.suffix.lower() in Image.registered_extensions() and not output.is_dir()


def _check_writable(folder: Path, output: Path) -> None:
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
