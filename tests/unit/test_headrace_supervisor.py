"""Watching over processes: started in order, restarted when they die, drained router first, none left behind."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from headrace import child, supervisor
from headrace.child import Child, describe_end
from headrace.plan import ClusterPlan, UpOptions, make_plan
from headrace.status_view import LineView
from headrace.supervisor import Supervisor
from protocol.errors import ConfigError, HeadraceError, UnavailableError
from runtime.life import ProcessLife

STAND_IN = Path(__file__).resolve().parents[1] / "support" / "stand_in_role.py"


class Notes(LineView):
    """A view that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


class Cluster:
    def __init__(self, folder: Path, restart: bool = True, log_dir: Path | None = None) -> None:
        self.folder = folder
        self.life = ProcessLife()
        self.view = Notes()
        self.ready = asyncio.Event()
        self.plan: ClusterPlan = make_plan(UpOptions(port=0), [0, 1], {})
        self.supervisor = Supervisor(
            self.plan, self.life, self.view, restart=restart, log_dir=log_dir, on_ready=lambda *_: self.ready.set()
        )

    def behave(self, name: str, behaviour: str) -> None:
        (self.folder / f"{name}.behaviour").write_text(behaviour)

    def records(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}-[0-9]*"), key=lambda path: path.stat().st_mtime_ns)

    def pid(self, name: str) -> int:
        return int(self.records(name)[-1].name.rpartition("-")[2])

    def alive(self) -> list[int]:
        pids = [int(path.name.rpartition("-")[2]) for path in self.folder.glob("*-[0-9]*") if path.suffix == ""]
        return [pid for pid in pids if psutil.pid_exists(pid)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.create_task(self.supervisor.run())
        try:
            await eventually(lambda: self.ready.is_set() or task.done())
            yield task
        finally:
            self.life.drain("end of test")
            self.life.stop("end of test")
            await asyncio.wait({task}, timeout=20)
            task.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(child, "headrace_command", lambda: [sys.executable, str(STAND_IN), str(tmp_path)])
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    return tmp_path


async def test_nodes_are_told_where_the_router_is_and_drained_after_it(folder: Path) -> None:
    cluster = Cluster(folder)
    async with cluster.running() as task:
        assert cluster.ready.is_set()
        assert 'routers=["http://127.0.0.1:' in cluster.records("decode-0")[0].read_text()
        cluster.life.drain("test")
        await asyncio.wait_for(task, 20)
    ends = {name: int(cluster.records(name)[0].read_text().split()[1]) for name in ("router", "prefill-0", "decode-0")}
    assert min(ends, key=lambda name: ends[name]) == "router"
    assert cluster.alive() == []


async def test_what_dies_is_reported_and_started_again(folder: Path) -> None:
    cluster = Cluster(folder)
    async with cluster.running():
        router_url = cluster.supervisor._router_urls["url"]
        for name in ("prefill-0", "router"):
            os.kill(cluster.pid(name), signal.SIGKILL)
            await eventually(
                lambda name=name: sum(line.startswith(f"{name} ready") for line in cluster.view.lines) == 2
            )
            assert cluster.view.count(f"{name} has died") == 1
            assert cluster.view.count("killed by SIGKILL") >= 1
        assert cluster.view.count("    2026-11-21T00:00:00.000Z WARNING prefill-0 x prefill-0 speaks") == 1
        assert cluster.supervisor._router_urls["url"] == router_url
    assert cluster.alive() == []


async def test_what_keeps_dying_at_start_ends_the_cluster(folder: Path) -> None:
    cluster = Cluster(folder)
    cluster.behave("decode-0", "dies")
    async with cluster.running() as task:
        with pytest.raises(UnavailableError, match="decode-0 does not start: exit status 7"):
            await task
    assert len(cluster.records("decode-0")) == 3
    assert cluster.alive() == []


async def test_what_refuses_its_settings_is_not_started_again(folder: Path) -> None:
    cluster = Cluster(folder)
    cluster.behave("prefill-0", "refuses")
    async with cluster.running() as task:
        with pytest.raises(ConfigError, match="prefill-0: no such transport"):
            await task
    assert len(cluster.records("prefill-0")) == 1
    assert cluster.alive() == []


@pytest.mark.parametrize(("victim", "goes_on"), [("prefill-0", True), ("decode-0", False), ("router", False)])
async def test_without_restarts_the_cluster_lives_as_long_as_it_can_serve(
    victim: str, goes_on: bool, folder: Path
) -> None:
    cluster = Cluster(folder, restart=False)
    async with cluster.running() as task:
        os.kill(cluster.pid(victim), signal.SIGKILL)
        await eventually(lambda: cluster.view.count(f"{victim} has died") == 1)
        if goes_on:
            assert len(cluster.alive()) == 2
        else:
            with pytest.raises(HeadraceError, match=victim):
                await task
    assert len(cluster.records(victim)) == 1
    assert cluster.alive() == []


async def test_a_second_signal_does_not_wait_for_what_ignores_the_first(folder: Path) -> None:
    cluster = Cluster(folder)
    cluster.behave("decode-0", "ignores")
    async with cluster.running() as task:
        cluster.life.drain("first")
        await eventually(lambda: "decode-0 draining" in cluster.view.lines)
        cluster.life.stop("second")
        await asyncio.wait_for(task, 10)
    assert cluster.view.count("decode-0 is killed: second") == 1
    assert cluster.alive() == []


async def test_logs_go_to_files_or_their_warnings_to_the_view(folder: Path, tmp_path: Path) -> None:
    with_files = Cluster(folder, log_dir=tmp_path)
    async with with_files.running():
        pass
    assert "decode-0 speaks" in (tmp_path / "decode-0.log").read_text()
    assert with_files.view.count("speaks") == 0
    without = Cluster(folder)
    async with without.running():
        pass
    assert without.view.count("decode-0 | 2026-11-21T00:00:00.000Z WARNING decode-0 x decode-0 speaks") == 1


async def test_a_child_takes_its_own_children_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    monkeypatch.setattr(child, "headrace_command", lambda: [sys.executable, "-c", code])
    pids: list[int] = []
    async with Child("parent", [], {}, on_line=lambda line: pids.append(int(line)) if line.isdigit() else None):
        await eventually(lambda: bool(pids))
    await eventually(lambda: not psutil.pid_exists(pids[0]) or psutil.Process(pids[0]).status() == "zombie")


async def test_a_line_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import sys; sys.stderr.write('x' * {3 * child.MAX_LINE_BYTES} + chr(10) + 'last')"
    monkeypatch.setattr(child, "headrace_command", lambda: [sys.executable, "-c", code])
    async with Child("talker", [], {}) as talker:
        assert await talker.wait() == 0
        assert talker.last_line == "last"
        assert sum(map(len, talker.tail(100))) == 3 * child.MAX_LINE_BYTES + len("last")


def test_ends_in_words() -> None:
    assert describe_end(-9) == "killed by SIGKILL"
    assert describe_end(1) == "exit status 1"
