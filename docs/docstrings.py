"""How this project's docstrings become Markdown: examples as code, arguments as a list."""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^((?:\w+)(?:, \w+)*): (?=\S)")


class Docstrings(griffe.Extension):
    """For mkdocstrings: rewrites each docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with its examples in fences and its arguments as list items.

    >>> print(as_markdown("Sum.\\n\\n>>> 1 + 1\\n2\\n\\nx: one\\n    number.\\nRaises TypeError."))
    Sum.
    <BLANKLINE>
    ```python
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    <BLANKLINE>
    - **x**: one
        number.
    <BLANKLINE>
    Raises TypeError.
    """
    lines: list[str] = []
    in_code = in_list = False
    for line in [*text.splitlines(), ""]:
        if line.startswith(">>>") and not in_code:
            in_code = True
            lines.append("```python")
        if in_code and not line.strip():
            in_code = False
            lines.append("```")
        argument = None if in_code else ARGUMENT.match(line)
        if argument:
            lines += [] if in_list else [""]
            in_list = True
            line = f"- **{argument[1]}**: {line[argument.end() :]}"
        elif in_list and not line.startswith(" "):
            in_list = False
            lines += [""] if line else []
        lines.append(line)
    return "\n".join(lines).rstrip()
