"""Pages link to files outside of docs/ as they lie in the repository; the site has its own copies
of the pictures, and no other of these files."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURE = r"\]\(%sassets/([\w.-]+\.png)\)"
FILE = r"\[([^\]]+)\]\(%s([\w./-]+)(#[\w-]+)?\)"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    up = "../" * page.file.src_uri.count("/")
    picture, file = (re.compile(link % re.escape(f"{up}../")) for link in (PICTURE, FILE))
    for name in picture.findall(markdown):
        _require(f"assets/{name}", page)
    for _, name, _ in file.findall(picture.sub("]", markdown)):
        _require(name, page)
    return file.sub(r"\1", picture.sub(rf"]({up}assets/\1)", markdown))


def on_files(files: Any, config: Any) -> Any:
    for picture in (ROOT / "assets").glob("*.png"):
        name = f"assets/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def _require(name: str, page: Any) -> None:
    if not (ROOT / name).exists():
        raise FileNotFoundError(f"{page.file.src_uri} links to {name}, which does not exist")
