"""What merges where in a model, as a table."""

from dataclasses import dataclass
from typing import NamedTuple


class ReportRow(NamedTuple):
    """One line of a report: a place in a model and what merging does there.

    tokens, merged: before and after merging, for the last image or else the model's own size; 0 if
        unknown. work: the share of self-attention's work that is left. note: why nothing merges.
    """

    where: str
    blocks: int
    tokens: int
    merged: int
    work: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `tomesd.report` returns; printing it gives a table.

    >>> report = tomesd.report(pipe)
    >>> report.rows["unet"][0].blocks
    2

    rows: by the name of the patched model.
    """

    rows: dict[str, list[ReportRow]]

    def __str__(self) -> str:
        lines = []
        for name, rows in self.rows.items():
            lines.append(
                f"{name:<28} {'blocks':>6} {'tokens':>7} {'merged to':>9} {'attention saved':>15}"
            )
            for row in rows:
                lines.append(
                    f"  {row.where:<26} {row.blocks:>6} {row.tokens:>7} {row.merged:>9} "
                    f"{_saved(row.tokens, row.work)}  {row.note}".rstrip()
                )
            work = sum(row.blocks * row.tokens**2 for row in rows)
            left = sum(row.blocks * row.tokens**2 * row.work for row in rows)
            lines.append(f"  {'all':<51} {_saved(work, left / max(work, 1))}")
        return "\n".join(lines)


def _saved(tokens: int, work: float) -> str:
    """A dash where the number of tokens is unknown."""
    return f"{1 - work:>15.1%}" if tokens else f"{'–':>15}"
