"""The failure table: a row for each test that is marked with a failure, printed when the run ends."""

import pytest

from protocol.transfer import Direction
from tests.support.failure_table import Case, Row, render
from tests.support.store_failures import StoreRow, render_rows

ROWS = pytest.StashKey[list[Row]]()
STORE_ROWS = pytest.StashKey[list[StoreRow]]()

UCX_TLS = ["default", "tcp"]
"""Both ways that UCX may take on one host."""

DIRECTIONS: list[Direction] = ["pull", "push"]
"""Who moves the bytes: "pull" is the reader, "push" the owner."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[STORE_ROWS] = []
    config.addinivalue_line("markers", "failure(name): what the test provokes; its row in the table of failures")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("failures provoked, and what became of them")
        for line in render(rows):
            terminalreporter.write_line(line)
    if store_rows := config.stash[STORE_ROWS]:
        terminalreporter.section("failures of stores, and what became of them")
        for line in render_rows(store_rows):
            terminalreporter.write_line(line)


@pytest.fixture(params=UCX_TLS)
def ucx_tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set for this process and for those it starts."""
    if request.param != "default":
        monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


@pytest.fixture(params=DIRECTIONS)
def direction(request: pytest.FixtureRequest) -> Direction:
    return "push" if request.param == "push" else "pull"


@pytest.fixture
def case(request: pytest.FixtureRequest, ucx_tls: str, direction: Direction) -> Case:
    """The row of a test that is marked with a failure."""
    marker = request.node.get_closest_marker("failure")
    assert marker is not None, "a test with a case says which failure it provokes"
    row = Row(marker.args[0], ucx_tls, direction)
    request.config.stash[ROWS].append(row)
    return Case(row)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> StoreRow:
    """The row of a test that provokes a failure of a store; named after its marker, and its parameters."""
    marker = request.node.get_closest_marker("failure")
    assert marker is not None, "a test with a row says which failure it provokes"
    parameters = request.node.callspec.id if hasattr(request.node, "callspec") else ""
    row = StoreRow(f"{marker.args[0]} {parameters}".strip())
    request.config.stash[STORE_ROWS].append(row)
    return row
