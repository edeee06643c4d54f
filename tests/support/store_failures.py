"""StoreFailures: what became of every failure of a store that a run provoked, one line each, printed at the end of the run."""

from collections.abc import Sequence
from dataclasses import dataclass

HEADER = ("failure of a store", "tokens", "cached then", "counted", "afterwards", "left behind")


@dataclass
class StoreRow:
    """A row that was never completed is a failure that was not survived."""

    failure: str
    tokens: str = "?"
    cached: str = "?"
    counted: str = ""
    after: str = "?"
    leaked: str = "?"

    def cells(self) -> tuple[str, ...]:
        return (self.failure, self.tokens, self.cached, self.counted, self.after, self.leaked)


def render_rows(rows: Sequence[StoreRow]) -> list[str]:
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
