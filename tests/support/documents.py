"""The Python examples of a page of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
