"""The regions of README.md and docs/ that tables are written into.

A region starts with the line `<!-- table: NAME -->` and ends with `<!-- /table -->`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.files import write_text
from benchmarks.results.files import ROOT
from benchmarks.results.tables import render

_REGION = re.compile(r"^<!-- table: (?P<name>.+?) -->\n(?P<old>.*?)^<!-- /table -->$", re.M | re.S)
_MARK = re.compile(r"^<!-- /?table\b.*$", re.M)


def documents(root: Path = ROOT) -> list[Path]:
    """README.md and docs/*.md."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def drifted(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """The document and name of each region that differs from its table.

    >>> write_text(Path("README.md"), "A document without tables.")
    >>> list(drifted(Path(".")))
    []

    Raises ValueError for an unknown table or unpaired markers, FileNotFoundError for a missing
    result; both name the document.
    """
    for document in documents(root):
        text = document.read_text(encoding="utf-8")
        for region in _regions(document, text):
            if region["old"] != _rendered(document, region["name"], root):
                yield document, region["name"]


def rewrite(root: Path = ROOT) -> list[tuple[Path, str]]:
    """Write all tables into their regions; returns those that differed.

    >>> write_text(Path("README.md"), "A document without tables.")
    >>> rewrite(Path("."))
    []

    Raises as `drifted` does; no document is changed then.
    """
    changed = list(drifted(root))
    for document in dict.fromkeys(document for document, _ in changed):
        text = document.read_text(encoding="utf-8")

        def replaced(region: re.Match[str], document: Path = document) -> str:
            name = region["name"]
            table = _rendered(document, name, root)
            return f"<!-- table: {name} -->\n{table}<!-- /table -->"

        write_text(document, _REGION.sub(replaced, text))
    return changed


def _regions(document: Path, text: str) -> list[re.Match[str]]:
    found = list(_REGION.finditer(text))
    inside = [mark for region in found for mark in _MARK.findall(region["old"])]
    if inside or len(_MARK.findall(text)) != 2 * len(found):
        raise ValueError(
            f"{document.name} must have a line <!-- /table --> for each <!-- table: NAME -->"
        )
    return found


def _rendered(document: Path, name: str, root: Path) -> str:
    try:
        return f"{render(name, root)}\n"
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{document.name}, table {name}: {error}") from error
