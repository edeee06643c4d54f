"""Supervisor: keeps a cluster's processes running, from the first start to the end of the drain.

    router listens -> nodes start -> all ready -> (SIGTERM) router finishes what it admitted -> nodes drain

A process that dies is reported with its last words and started again after a pause. One that never gets ready, or that
refuses its settings, ends the cluster. Leaving `run`, in whatever way, leaves no process behind.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from headrace.child import Child, describe_end
from headrace.cores import format_cpus
from headrace.plan import ChildSpec, ClusterPlan
from headrace.status_view import StatusView
from protocol.errors import ConfigError, HeadraceError, UnavailableError
from runtime.life import Phase, ProcessLife

READY_POLL_S = 0.1
READY_TIMEOUT_S = 2.0
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 15.0
STEADY_AFTER_S = 60.0
"""A process that lived this long is started again after the first, short pause."""

MAX_FAILED_STARTS = 3
REFUSED_STATUS = 2
"""Exit status of a process that refuses its settings: to start it again would change nothing."""

TAIL_LINES = 15
DRAIN_MARGIN_S = 5.0
"""What a process gets beyond its own drain timeout before it is killed."""

WARNING_LEVELS = ("WARNING", "ERROR", "CRITICAL")


class Supervisor:
    """`on_ready(url, control_url)` is called once: all processes are ready for the first time, clients are served at the
    first, and the cluster is managed at the second.

    With `log_dir`, each process's log goes to a file there; without, its warnings go to the view.
    """

    def __init__(
        self,
        plan: ClusterPlan,
        life: ProcessLife,
        view: StatusView,
        *,
        restart: bool,
        log_dir: Path | None,
        on_ready: Callable[[str, str], None],
    ) -> None:
        self._plan = plan
        self._life = life
        self._view = view
        self._restart = restart
        self._log_dir = log_dir
        self._on_ready = on_ready
        self._children: dict[str, Child] = {}
        self._ready = {spec.name: asyncio.Event() for spec in plan.children}
        self._router_urls: dict[str, str] = {}
        self._router_listens = asyncio.Event()
        self._failure: HeadraceError | None = None

    async def run(self) -> None:
        """Until `life` drains and the cluster has. Raises a HeadraceError if it cannot be kept up."""
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._keep(spec, session), name=f"keep:{spec.name}") for spec in self._plan.children
            ]
            background.append(tasks.create_task(self._tell_when_ready(), name="tell-when-ready"))
            await self._life.wait(Phase.DRAINING)
            await self._drain()
            for task in background:
                task.cancel()
        if self._failure is not None:
            raise self._failure

    async def _keep(self, spec: ChildSpec, session: aiohttp.ClientSession) -> None:
        """One process, however often it has to be started."""
        if spec is not self._plan.router:
            await self._router_listens.wait()
        failed_starts, pause_s = 0, FIRST_PAUSE_S
        while not self._life.draining:
            started = time.monotonic()
            async with self._make_child(spec) as child:
                self._children[spec.name] = child
                self._view.update(spec.name, "starting", f"on cores {format_cpus(spec.cpus)}" if spec.cpus else "")
                became_ready = await self._start(spec, child, session)
                code = await child.wait()
            self._ready[spec.name].clear()
            if self._life.draining:
                self._view.update(spec.name, "ended", describe_end(code))
                return
            lived_s = time.monotonic() - started
            failed_starts = 0 if became_ready else failed_starts + 1
            self._report_death(spec, child, code, lived_s)
            if self._is_hopeless(spec, child, code, failed_starts):
                return
            pause_s = FIRST_PAUSE_S if lived_s > STEADY_AFTER_S else pause_s
            self._view.update(spec.name, "died", f"starting again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _make_child(self, spec: ChildSpec) -> Child:
        """The router gets the ports that it had before, the nodes where the router is."""
        late: dict[str, object] = {}
        if spec is not self._plan.router:
            late["routers"] = [self._router_urls["control_url"]]
        elif self._router_urls:
            late["port"] = urlsplit(self._router_urls["url"]).port
            late["control_port"] = urlsplit(self._router_urls["control_url"]).port
        if self._log_dir is not None:
            return Child(spec.name, spec.arguments(late), spec.environment, self._log_dir / f"{spec.name}.log")
        return Child(
            spec.name, spec.arguments(late), spec.environment, on_line=lambda line: self._show_warning(spec.name, line)
        )

    async def _start(self, spec: ChildSpec, child: Child, session: aiohttp.ClientSession) -> bool:
        """Until it is ready (True), or has ended. A router is ready once it has a node."""
        started = time.monotonic()
        announced = asyncio.create_task(child.wait_announced())
        try:
            while not announced.done():
                await asyncio.wait({announced}, timeout=READY_POLL_S)
                self._show_progress(spec, child)
        finally:
            announced.cancel()
        if not announced.result():
            return False
        if spec is self._plan.router:
            self._router_urls = dict(child.announcement)
            self._router_listens.set()
        url = child.announcement["url"]
        while not await _answers(session, f"{url}/ready"):
            if child.returncode is not None:
                return False
            self._show_progress(spec, child)
            await asyncio.sleep(READY_POLL_S)
        if not self._life.draining:
            self._view.update(spec.name, "ready", f"after {time.monotonic() - started:.1f} s at {url}")
            self._ready[spec.name].set()
        return True

    async def _tell_when_ready(self) -> None:
        for event in self._ready.values():
            await event.wait()
        if self._life.ready():
            self._on_ready(self._router_urls["url"], self._router_urls["control_url"])

    async def _drain(self) -> None:
        """The router first: it admits nothing more, and finishes what runs, for which it needs the nodes."""
        for specs in ((self._plan.router,), self._plan.nodes):
            children = [
                child
                for spec in specs
                if (child := self._children.get(spec.name)) is not None and child.returncode is None
            ]
            for child in children:
                self._view.update(child.name, "draining")
                child.signal(signal.SIGTERM)
            await self._wait_ended(children, max(spec.drain_timeout_s for spec in specs) + DRAIN_MARGIN_S)
            for child in children:
                if child.returncode is None:
                    reason = self._life.reason if self._life.phase is Phase.STOPPED else "it has not drained in time"
                    self._view.say(f"{child.name} is killed: {reason}")
                    child.signal(signal.SIGKILL)

    async def _wait_ended(self, children: Sequence[Child], timeout_s: float) -> None:
        """Until they have ended, the time is up, or the user does not want to wait any longer."""
        ended = asyncio.create_task(_all_ended(children))
        stopped = asyncio.create_task(self._life.wait(Phase.STOPPED))
        try:
            await asyncio.wait({ended, stopped}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            stopped.cancel()

    def _report_death(self, spec: ChildSpec, child: Child, code: int, lived_s: float) -> None:
        lines = child.tail(TAIL_LINES)
        self._view.say(f"{spec.name} has died after {lived_s:.1f} s: {describe_end(code)}; its last lines:")
        for line in lines or ["(none)"]:
            self._view.say(f"    {line}")

    def _is_hopeless(self, spec: ChildSpec, child: Child, code: int, failed_starts: int) -> bool:
        """Whether this process is not to be started again. Ends the cluster if it is of no use without it."""
        if code == REFUSED_STATUS and failed_starts:
            self._fail(ConfigError(f"{spec.name}: {child.last_line.removeprefix('headrace: ')}"))
        elif failed_starts >= (MAX_FAILED_STARTS if self._restart else 1):
            self._fail(UnavailableError(f"{spec.name} does not start: {describe_end(code)}; its last lines are above"))
        elif not self._restart:
            self._view.update(spec.name, "died", "not started again: --no-restart")
            decoding = [node.name for node in self._plan.nodes if node.role == "decode"]
            if spec is self._plan.router or not any(self._ready[name].is_set() for name in decoding):
                self._fail(UnavailableError(f"without {spec.name} nothing can be served"))
        else:
            return False
        return True

    def _fail(self, error: HeadraceError) -> None:
        self._failure = self._failure or error
        self._life.drain(error.message)

    def _show_progress(self, spec: ChildSpec, child: Child) -> None:
        if child.last_line and not self._life.draining:
            self._view.update(spec.name, "starting", _message(child.last_line))

    def _show_warning(self, name: str, line: str) -> None:
        if any(f" {level} " in line[:40] for level in WARNING_LEVELS):
            self._view.say(f"{name} | {line}")


def _message(line: str) -> str:
    """A line of a log (runtime.logs) without time, level, role and logger; any other as it is."""
    parts = line.split(" ", 4)
    return parts[4] if len(parts) == 5 and parts[1].isupper() else line


async def _all_ended(children: Sequence[Child]) -> None:
    for child in children:
        await child.wait()


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=READY_TIMEOUT_S)) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False
