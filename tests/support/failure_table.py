"""FailureTable: what became of every failure that a run provoked, one line each, printed at the end of the run.

A test says what it provokes with a marker (`@pytest.mark.failure("F1 owner killed in a read")`), records what it saw
through its Case, and lets the Case check what must hold after any failure. A row that was never completed is a failure
that the layer did not survive; it is printed as that.
"""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from protocol.transfer import Direction
from tests.support.kv_commands import NodeSpec, Outcome, Resources
from tests.support.kv_process import NodeProcess, node_process

pull_only = pytest.mark.parametrize("direction", ["pull"], indirect=True)
"""For failures before any byte moves: who would have moved them makes no difference."""

BASELINE_S = 10.0
"""How long what was in use may take to come back. A guard against hanging, not a measurement."""

HEADER = ("failure", "UCX", "moved by", "what happened", "after", "survivor", "leaked", "usable again")


@dataclass
class Row:
    failure: str
    transports: str
    direction: Direction
    seen: list[str] = field(default_factory=list)
    took_s: float = 0.0
    survivor: str = "?"
    leaked: str = "?"
    usable: str = "?"

    def cells(self) -> tuple[str, ...]:
        seen = "; ".join(dict.fromkeys(self.seen)) or "?"
        took = f"{self.took_s * 1e3:.0f} ms" if self.seen else "?"
        return (self.failure, self.transports, self.direction, seen, took, self.survivor, self.leaked, self.usable)


class Case:
    """One failure under one set of transports and in one direction."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.direction = row.direction
        self.transports = row.transports

    def node(self, spec: NodeSpec) -> AbstractAsyncContextManager[NodeProcess]:
        """A process for this case: `async with case.node(spec) as node:`."""
        return node_process(dataclasses.replace(spec, direction=self.direction))

    def saw(self, outcome: Outcome | str, took_s: float = 0.0) -> None:
        """Note an outcome, and how long the one who waited for it waited. The longest counts."""
        if isinstance(outcome, Outcome):
            took_s = outcome.took_s
            outcome = outcome.error or "right bytes"
        self.row.seen.append(outcome)
        self.row.took_s = max(self.row.took_s, took_s)

    def leave_out(self, why: str) -> NoReturn:
        """For what is known not to be survived: said in the table, and skipped."""
        self.row.seen.append(f"left out: {why}")
        self.row.survivor = "no"
        pytest.skip(why)

    def leave_out_reads_over_tcp(self) -> None:
        """For readers that end while an owner still owes them bytes. Over TCP the owner's library has to send those, and
        UCX 1.23 aborts the process when it goes on for a connection that has gone."""
        if (self.transports, self.direction) == ("tcp", "pull"):
            self.leave_out("UCX 1.23 aborts an owner that is read over TCP; it is safe when it pushes")

    async def check_alive(self, *survivors: NodeProcess) -> None:
        for node in survivors:
            assert node.exit_code is None, f"the {node.spec.role} died of it: exit code {node.exit_code}"
        self.row.survivor = "lives"

    async def check_usable(self, reader: NodeProcess, owner: NodeProcess, request_id: str = "after") -> Outcome:
        """The next hand-off from this owner to this reader just works, and brings the right bytes."""
        outcome = await fetch_right(reader, owner, request_id, [40, 41, 43, 42], [50, 51, 52, 53])
        assert outcome.error is None, f"the link is not usable again: {outcome}"
        self.row.usable = "yes"
        return outcome

    async def check_nothing_leaked(self, before: Sequence[tuple[NodeProcess, Resources]], files: int = 2) -> None:
        """Every survivor comes back to what it held before: threads, files, tasks, quarantine, leases."""
        deadline = time.monotonic() + BASELINE_S
        for node, held in before:
            while excess := (await node.resources()).excess_over(held, files):
                assert time.monotonic() < deadline, f"the {node.spec.role} has leaked {', '.join(excess)}"
        self.row.leaked = "nothing"


async def fetch_right(
    reader: NodeProcess, owner: NodeProcess, request_id: str, remote: list[int], local: list[int]
) -> Outcome:
    """A whole hand-off. If it succeeds, the bytes are the owner's."""
    expected = await owner.digests(remote)
    outcome = await reader.fetch(await owner.hand_off(request_id, remote), local)
    if outcome.error is None:
        assert await reader.digests(local) == expected, "wrong bytes without an error"
    return outcome


def render(rows: Sequence[Row]) -> list[str]:
    lines = [HEADER, *(row.cells() for row in sorted(rows, key=lambda row: (row.failure, row.direction)))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
