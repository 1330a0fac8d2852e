"""Prompts from a file."""

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, one prompt each.

    >>> Path("prompts.txt").write_text("a red heart\\na blue star\\n")
    >>> read_prompts(Path("prompts.txt"))
    ['a red heart', 'a blue star']

    Raises FileNotFoundError, or ValueError for a file that is empty, has empty lines or is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts must be a file, got {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts must be UTF-8 text, got {str(path)!r}: {error}") from error
    empty = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {', '.join(empty)}" if empty else "all of it"
        raise ValueError(f"prompts must have no empty lines, got {str(path)!r}: {where} is empty")
    return lines
