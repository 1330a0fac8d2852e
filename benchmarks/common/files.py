"""Files that are written completely or not at all, and folders named after their settings."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tomesd.pictures.files import atomic_write, check_writable, looks_like_a_picture


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


def check_folder(output: Path) -> None:
    """Raises ValueError unless `output` is an existing or a new folder that can be written to.

    >>> check_folder(Path("runs/sd1.5"))

    The name of a picture is refused too: a folder table.png/ is not what was meant.
    """
    if output.is_file():
        raise ValueError(f"output must be a folder, got the file {str(output)!r}")
    if looks_like_a_picture(output):
        raise ValueError(f"output must be a folder, got a picture's name, {str(output)!r}")
    check_writable(output, output)


def check_file(output: Path) -> None:
    """Raises ValueError unless `output` is an existing or a new file that can be written to.

    >>> check_file(Path("figures.json"))
    """
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {str(output)!r}")
    check_writable(output.parent, output)
