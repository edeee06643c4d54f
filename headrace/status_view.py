"""What the user sees of a starting, running and ending cluster: a live table on a terminal, lines elsewhere.

Used as `with make_view(...) as view:`. States change through `update`; `say` is for everything else, above the table.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

STYLES = {"ready": "green", "ended": "dim", "died": "red", "draining": "yellow"}
MAX_DETAIL_CHARS = 90


@dataclass(slots=True)
class _Row:
    state: str
    detail: str
    since: float


class StatusView(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, name: str, state: str, detail: str = "") -> None:
        """A process has reached a state, or is at something new within it."""
        ...

    def say(self, text: str) -> None:
        """Words that stay."""
        ...

    def settle(self) -> None:
        """Everything is up: leave the table as it is, and only say what happens from now on."""
        ...


def make_view(names: Sequence[str]) -> StatusView:
    return LiveView(names) if sys.stdout.isatty() else LineView()


class LineView:
    """A line for each new state; details only with it."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, name: str, state: str, detail: str = "") -> None:
        if self._states.get(name) != state:
            self._states[name] = state
            self.say(f"{name} {state}{f': {detail}' if detail else ''}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def settle(self) -> None:
        return None


class LiveView:
    """One row for each process: what it is at, and for how long."""

    def __init__(self, names: Sequence[str]) -> None:
        now = time.monotonic()
        self._rows = {name: _Row("waiting", "", now) for name in names}
        self._console = Console(highlight=False)
        self._live: Live | None = Live(get_renderable=self._table, console=self._console, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.settle()

    def update(self, name: str, state: str, detail: str = "") -> None:
        row = self._rows.setdefault(name, _Row(state, detail, time.monotonic()))
        if row.state != state:
            row.since = time.monotonic()
            if self._live is None:
                self.say(f"{name} {state}{f': {detail}' if detail else ''}")
        row.state, row.detail = state, detail

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def settle(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        now = time.monotonic()
        for name, row in self._rows.items():
            seconds = "" if row.state in ("ready", "waiting") else f"{now - row.since:.0f} s"
            state = Text(row.state, style=STYLES.get(row.state, "cyan"))
            table.add_row(name, state, seconds, Text(row.detail[:MAX_DETAIL_CHARS], style="dim"))
        return table
